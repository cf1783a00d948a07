"""The host tier of the KV cache: block transfers to and from the host, and its contents."""
