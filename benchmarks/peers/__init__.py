"""Time other trainers beside this one."""
