//! Images, layers and overlay root file systems on disk.
