"""HTTP code that routers, engines' servers and sidecars share."""
