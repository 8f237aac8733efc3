"""The regional tier's HTTP service: wire batches in, receipts out (docs/wire-format.md)."""
