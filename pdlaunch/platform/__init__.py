"""What this machine is: devices, driver, limits; the only room that asks, and it never raises."""
