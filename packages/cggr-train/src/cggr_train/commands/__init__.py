"""The commands of ``cggr``, one file each."""
