"""From device states to host numbers: one reduction a lane, read one step later."""
