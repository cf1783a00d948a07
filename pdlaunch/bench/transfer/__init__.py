"""`pdlaunch bench transfer`: pulls of KV blocks between real ranks."""
