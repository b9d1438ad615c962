"""Files of genomes, read as regions of clean bases."""
