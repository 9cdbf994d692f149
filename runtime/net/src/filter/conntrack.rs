//! Forgets tracked UDP flows whose published port now leads elsewhere.
//!
//! The redirect is chosen once per flow. A UDP client that keeps sending from one port keeps its flow alive, and would
//! go on reaching the old pod, or nobody, for as long as it sends. TCP connections end by themselves.

use std::collections::BTreeSet;

use nix::errno::Errno;

use crate::filter::encode::family_header;
use crate::filter::lower::Protocol;
use keel_sys::netlink::wire::{self, Writer};
use keel_sys::netlink::{Netlink, NetlinkError};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const CT_GET: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 1;
const CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 2;
const AF_INET: u8 = 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_ID: u16 = 12;
/// nfgenmsg.
const HEADER: usize = 4;

struct Flow {
    tuple: Vec<u8>,
    id: Vec<u8>,
}

/// Answers how many flows are forgotten.
pub(crate) fn forget_udp(socket: &mut Netlink, ports: &BTreeSet<u16>) -> Result<usize, NetlinkError> {
    if ports.is_empty() {
        return Ok(0);
    }
    let body = |w: &mut Writer| family_header(w, AF_INET, 0);
    let flows = socket.list("list the tracked connections", CT_GET, body, |body| {
        let list = body.get(HEADER..)?;
        let tuple = wire::find(list, CTA_TUPLE_ORIG)?;
        let transport = wire::find(tuple, CTA_TUPLE_PROTO)?;
        let port = wire::find(transport, CTA_PROTO_DST_PORT)?;
        let stale = wire::find(transport, CTA_PROTO_NUM)? == [Protocol::Udp.number()]
            && ports.contains(&u16::from_be_bytes(port.try_into().ok()?));
        stale.then(|| Flow {
            tuple: tuple.to_vec(),
            id: wire::find(list, CTA_ID).unwrap_or_default().to_vec(),
        })
    })?;
    let mut forgotten = 0;
    for flow in flows {
        let deleted = socket.request("forget a tracked UDP flow", CT_DELETE, |w| {
            family_header(w, AF_INET, 0);
            w.attribute(CTA_TUPLE_ORIG | NESTED, &flow.tuple);
            if !flow.id.is_empty() {
                w.attribute(CTA_ID, &flow.id);
            }
        });
        match deleted {
            Ok(()) => forgotten += 1,
            Err(error) if error.is(Errno::ENOENT as i32) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}
