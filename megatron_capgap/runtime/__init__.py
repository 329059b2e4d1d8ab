"""Where a run happens: launch environment, process groups, devices, logging, signals."""
