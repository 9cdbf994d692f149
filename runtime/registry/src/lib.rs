//! The registry client: pull by tag or digest into the store.
