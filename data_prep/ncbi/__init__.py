"""From a list of species to files of genomes."""
