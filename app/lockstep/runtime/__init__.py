"""What knows no ranks: errors, seeds, the launcher's word, cores, devices, memory, the flight recorder."""
