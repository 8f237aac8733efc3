"""The status document: its structs, how it is collected, what it advises, and the metrics."""
