"""Tokenizers: trained, made and compared."""
