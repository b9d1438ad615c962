"""Scripts for Slurm clusters: plain sbatch files around the commands of the other packages."""
