"""Networks: small ones for vectors and for 28 × 28 digits."""
