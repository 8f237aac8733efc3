"""The contract between a gateway and its upstream tiers, and both of its ends.

Pure: records, columns, wire, verdicts, backoff, errors. Input and output: shipper, destinations, ingest.
Nothing here imports `gateway`.
"""
