"""Imported last by the workers' parent: what it has loaded is kept out of garbage collection, in its forks too, which
would otherwise look through it, and so copy it, at each."""

import gc

gc.collect()
gc.freeze()
