"""What tests, benchmarks and the doctor share: the table of ops."""
