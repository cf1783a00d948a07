"""What routers and engines' servers share as HTTP servers: who may speak to them, and how much."""
