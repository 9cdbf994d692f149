//! Addresses as pure functions: which subnet an instance takes, which address a pod gets.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::config::digest;

/// What the default instance takes when it is free.
const PREFERRED: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 77, 0, 0), 16);
/// The space that every instance takes its subnet from: rarely used by home and office networks,
/// clear of the usual ranges of other engines (10.88/16, 172.16/12) but for its upper edge, which is probed like any other.
const SPACE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 64, 0, 0), 10);
/// 1021 pods for an instance with its own root.
const TAGGED_PREFIX: u8 = 22;
/// Network, gateway and broadcast are not for pods.
const FIRST_POD_OFFSET: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    #[error("no free address in {subnet} for {key}: {used} are in use")]
    Full { key: String, subnet: Ipv4Net, used: usize },
    #[error("the subnet {subnet} has no room for pods: the prefix must be /29 or shorter")]
    TooSmall { subnet: Ipv4Net },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "every /{prefix} inside {SPACE} overlaps a route or an address of this host; choose a subnet in the configuration"
)]
pub struct NoFreeSubnet {
    pub prefix: u8,
}

/// An address for each of `keys`. A valid address in `already` is kept; the others start at an offset that depends on
/// the key alone and move on where that is taken. Addresses in `already` of keys that are not asked for
/// are not given away. Same input, same answer.
pub fn assign<K: Ord + Clone + Display>(
    keys: &[K],
    already: &BTreeMap<K, Ipv4Addr>,
    subnet: Ipv4Net,
) -> Result<BTreeMap<K, Ipv4Addr>, AssignError> {
    // A /29 holds five pods; anything smaller is a mistake in a configuration.
    if subnet.prefix_len() > 29 {
        return Err(AssignError::TooSmall { subnet });
    }
    let base = u32::from(subnet.network());
    let count = u32::from(subnet.broadcast()) - base - FIRST_POD_OFFSET;
    let pods = base + FIRST_POD_OFFSET..base + FIRST_POD_OFFSET + count;
    let asked: BTreeSet<&K> = keys.iter().collect();
    let mut taken: BTreeSet<Ipv4Addr> =
        already.iter().filter(|(key, _)| !asked.contains(key)).map(|(_, ip)| *ip).collect();
    let mut all = BTreeMap::new();
    for key in keys {
        if let Some(ip) = already.get(key)
            && pods.contains(&u32::from(*ip))
            && taken.insert(*ip)
        {
            all.insert(key.clone(), *ip);
        }
    }
    for key in keys {
        if all.contains_key(key) {
            continue;
        }
        let start = hash(&["pod address", &key.to_string()]) % count;
        let free = (0..count)
            .map(|step| Ipv4Addr::from(pods.start + (start + step) % count))
            .find(|ip| !taken.contains(ip))
            .ok_or_else(|| AssignError::Full { key: key.to_string(), subnet, used: taken.len() })?;
        taken.insert(free);
        all.insert(key.clone(), free);
    }
    Ok(all)
}

/// A subnet that overlaps none of `used`. The default instance (empty tag) prefers 10.77.0.0/16; the
/// others start where their tag's hash says, so that they rarely meet.
pub fn choose_subnet(tag: &str, used: &[Ipv4Net]) -> Result<Ipv4Net, NoFreeSubnet> {
    let prefix = if tag.is_empty() { PREFERRED.prefix_len() } else { TAGGED_PREFIX };
    let size = 1u32 << (32 - prefix);
    let base = u32::from(SPACE.network());
    let count = (u32::from(SPACE.broadcast()) - base) / size + 1;
    let start = if tag.is_empty() {
        (u32::from(PREFERRED.network()) - base) / size
    } else {
        hash(&["subnet", tag]) % count
    };
    (0..count)
        .map(|step| Ipv4Addr::from(base + (start + step) % count * size))
        .map(|network| Ipv4Net::new(network, prefix).expect("16 and 22 are valid prefix lengths"))
        // The default instance may start later than this one and still finds its own subnet free.
        .filter(|subnet| tag.is_empty() || !overlaps(subnet, &PREFERRED))
        .find(|subnet| !used.iter().any(|other| overlaps(subnet, other)))
        .ok_or(NoFreeSubnet { prefix })
}

fn overlaps(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn hash(parts: &[&str]) -> u32 {
    let [a, b, c, d, ..] = digest(parts);
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("default/pod-{n}")).collect()
    }

    #[test]
    fn same_keys_same_addresses_in_any_order_without_collisions() {
        let mut keys = names(20);
        let first = assign(&keys, &BTreeMap::new(), net("10.77.0.0/16")).unwrap();
        keys.reverse();
        assert_eq!(first, assign(&keys, &BTreeMap::new(), net("10.77.0.0/16")).unwrap());
    }

    #[test]
    fn existing_addresses_stay_and_invalid_ones_move() {
        let subnet = net("10.1.0.0/24");
        let ip = |last| Ipv4Addr::new(10, 1, 0, last);
        let already = BTreeMap::from([
            ("kept".to_owned(), ip(9)),
            ("twin".to_owned(), ip(9)),
            ("gateway".to_owned(), ip(1)),
            ("network".to_owned(), ip(0)),
            ("broadcast".to_owned(), ip(255)),
            ("foreign".to_owned(), Ipv4Addr::new(10, 2, 0, 9)),
            ("other".to_owned(), ip(10)),
        ]);
        let keys: Vec<String> = already.keys().filter(|key| *key != "other").cloned().collect();
        let all = assign(&keys, &already, subnet).unwrap();
        assert_eq!(all["kept"], ip(9));
        assert!(!all.contains_key("other"));
        let unique: BTreeSet<_> = all.values().collect();
        assert_eq!(unique.len(), all.len());
        for address in all.values() {
            assert!((2..255).contains(&address.octets()[3]) && subnet.contains(address), "{address}");
        }
    }

    #[test]
    fn addresses_of_others_are_not_given_away() {
        let subnet = net("192.0.2.0/29");
        let mut taken = BTreeMap::new();
        for key in names(5) {
            let one = assign(std::slice::from_ref(&key), &taken, subnet).unwrap();
            assert!(!taken.values().any(|ip| *ip == one[&key]));
            taken.extend(one);
        }
        assert!(matches!(assign(&["sixth".to_owned()], &taken, subnet), Err(AssignError::Full { .. })));
    }

    #[test]
    fn a_full_subnet_is_an_error_and_every_address_before_it_is_used() {
        let subnet = net("10.1.0.0/29");
        let all = assign(&names(5), &BTreeMap::new(), subnet).unwrap();
        let last: BTreeSet<u8> = all.values().map(|ip| ip.octets()[3]).collect();
        assert_eq!(last, BTreeSet::from([2, 3, 4, 5, 6]));
        assert!(matches!(
            assign(&names(6), &BTreeMap::new(), subnet),
            Err(AssignError::Full { used: 5, .. })
        ));
        assert!(matches!(
            assign(&names(1), &BTreeMap::new(), net("10.1.0.0/30")),
            Err(AssignError::TooSmall { .. })
        ));
    }

    #[test]
    fn every_history_of_a_small_subnet_keeps_addresses_unique() {
        // All subsets of six keys after all subsets: whoever stays keeps the address.
        let subnet = net("192.0.2.0/29");
        let keys = names(6);
        let subset = |bits: u32| -> Vec<String> {
            keys.iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1).map(|(_, key)| key.clone()).collect()
        };
        for before in 0..64u32 {
            let Ok(old) = assign(&subset(before), &BTreeMap::new(), subnet) else { continue };
            for after in 0..64u32 {
                let wanted = subset(after);
                let mut old = old.clone();
                old.retain(|key, _| wanted.contains(key));
                let Ok(new) = assign(&wanted, &old, subnet) else {
                    assert!(wanted.len() > 5);
                    continue;
                };
                assert_eq!(new.len(), wanted.len());
                assert_eq!(new.values().collect::<BTreeSet<_>>().len(), new.len());
                assert!(new.iter().all(|(key, ip)| old.get(key).is_none_or(|kept| kept == ip)));
            }
        }
    }

    #[test]
    fn subnets_avoid_what_the_host_uses() {
        assert_eq!(choose_subnet("", &[]).unwrap(), net("10.77.0.0/16"));
        assert_eq!(choose_subnet("", &[net("10.77.3.0/24")]).unwrap(), net("10.78.0.0/16"));
        assert_eq!(choose_subnet("", &[net("10.64.0.0/11")]).unwrap(), net("10.96.0.0/16"));
        assert_eq!(choose_subnet("", &[net("10.0.0.0/8")]), Err(NoFreeSubnet { prefix: 16 }));
        let a = choose_subnet("-aaaaaa", &[]).unwrap();
        assert_eq!((a, a.prefix_len()), (choose_subnet("-aaaaaa", &[]).unwrap(), 22));
        let moved = choose_subnet("-aaaaaa", &[a]).unwrap();
        assert_ne!(moved, a);
        for tag in ["-000000", "-abcdef", "-12ab9f"] {
            let chosen = choose_subnet(tag, &[]).unwrap();
            assert!(SPACE.contains(&chosen.network()) && !overlaps(&chosen, &PREFERRED));
        }
    }
}
