//! Bridge, veth, addresses and nf_tables over netlink.
