"""Tokens and likelihoods for requests, many mixes in one batch."""
