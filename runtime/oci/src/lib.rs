//! The OCI runtime specification, lowered to operations and executed.
