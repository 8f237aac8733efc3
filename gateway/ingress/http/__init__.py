"""The `http` ingress: readings and batches over HTTP, answered after the commit."""
