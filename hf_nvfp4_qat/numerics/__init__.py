"""What NVFP4 is: the format, one record, and the only door through which a tensor becomes NVFP4."""
