//! Images on disk: verified blobs, unpacked layers, image records, and the overlay root file systems made of them.
//!
//! Never: the network, an async runtime, a database; following a path that an image wrote; a panic on what is found
//! on disk. Whatever file of the store is lost or damaged is rebuilt, set aside or reported.
//!
//! ```text
//! R/oci-layout, R/index.json, R/blobs/sha256/<hex>   an OCI image layout, readable by other tools; index.json is derived
//! R/partial/<hex>/{data,state}                       blobs that are still arriving, and how far their hash has come
//! R/layers/<diff id>/{fs/,layer.json}                one directory per layer, shared by all images
//! R/good/<owner>.json                                 what containers have run well from
//! R/images/<name>.json                               one record per reference: the truth about what images there are
//! ```
//!
//! Order of a commit: blobs and layers are written aside, one `syncfs` makes them durable, renames publish them, the
//! image record is written last. A power cut at any moment leaves the image complete or absent.

mod archive;
mod blob;
mod builder;
mod census;
mod collect;
mod digest;
mod fixup;
mod fsio;
mod good;
mod heal;
mod image;
mod import;
mod index;
mod layer;
mod midstate;
mod mount;
mod path;
mod platform;
mod reference;
mod save;
mod space;
mod store;
mod stream;
mod tar;
mod tarwrite;
mod tree;
mod unpack;
mod usage;
mod user;
mod verify;

pub use archive::ArchiveError;
pub use blob::{BlobError, BlobWriter, Partial};
pub use builder::{BuildError, ConfigSpec, Content, FileSpec, LayerSpec};
pub use collect::{Collected, Roots};
pub use digest::{Digest, DigestError};
pub use fixup::FixupError;
pub use fsio::{FsError, is_no_space};
pub use image::{CommitError, Image, ImageError, Layer, MAX_CONFIG, MAX_MANIFEST};
pub use import::{ImportError, ImportOptions, Transfer};
pub use index::{Blob, Index, IndexError, IndexWalk, Member, stays_with_its_publisher};
pub use layer::{LayerError, LayerIngest};
pub use mount::{MountError, RootfsOptions, unmount_rootfs};
pub use path::PathError;
pub use platform::Platform;
pub use reference::{Reference, ReferenceError, canonical_reference};
pub use save::{SaveError, SaveFormat};
pub use space::Space;
pub use store::{Lease, OpenError, Options, Store};
pub use tar::TarError;
pub use unpack::UnpackError;
pub use usage::{ImageUsage, Usage};
pub use user::{User, UserError, resolve_user};
pub use verify::{Damage, Depth, LostImage, Report};

#[cfg(test)]
mod tests;
