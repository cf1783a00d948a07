"""Load with known answers and injected faults: soaks and chaos."""
