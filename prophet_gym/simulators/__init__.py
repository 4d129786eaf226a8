"""The real simulators that Prophet learns from and is held against."""
