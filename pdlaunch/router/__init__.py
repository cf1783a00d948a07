"""P/D routing; no torch."""
