"""Models that are asked about answers: here, or behind an endpoint."""
