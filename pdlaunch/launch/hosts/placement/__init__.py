"""Places engines with cluster schedulers (Ray, Slurm), and starts agents there."""
