"""Load with known answers, injected faults, kills: chaos and soaks."""
