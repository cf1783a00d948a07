"""`pdlaunch bench transfer` times pulls of KV blocks between real ranks."""
