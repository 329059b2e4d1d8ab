"""Saving and loading: any layout to any layout, the newest complete one, never a half-written one."""
