"""The conformance matrix: every architecture of backbone against plain transformers and PEFT."""
