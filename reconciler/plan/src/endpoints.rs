//! Which pod has which host port, and what the network is to be told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::hash::Hasher;
use crate::model::{Desired, DesiredPod, Endpoint, Observed, ObservedPod, PodKey, PublishedPort, SpecHash};

/// Host ports and who has them: pods that exist before pods that do not, older before younger, then by name.
pub(crate) struct PortTable<'a> {
    claims: BTreeMap<(u16, &'static str), Vec<Claim<'a>>>,
    taken: BTreeMap<&'a PodKey, (u16, &'a PodKey)>,
}

/// Host address (`None`: all of them) and holder.
type Claim<'a> = (Option<Ipv4Addr>, &'a PodKey);

impl<'a> PortTable<'a> {
    pub(crate) fn of(desired: &'a Desired, observed: &'a Observed) -> PortTable<'a> {
        let mut table = PortTable { claims: BTreeMap::new(), taken: BTreeMap::new() };
        let mut existing: Vec<_> = observed.pods.values().filter(|seen| has_host_ports(&seen.pod)).collect();
        existing.sort_by_key(|seen| (seen.created_at, &seen.pod.key));
        for seen in existing {
            table.claim(&seen.pod);
        }
        let wanted = desired.pods.values().filter(|pod| has_host_ports(pod));
        let (present, absent): (Vec<&DesiredPod>, Vec<&DesiredPod>) =
            wanted.map(AsRef::as_ref).partition(|pod| observed.pods.contains_key(&pod.key));
        for pod in present.into_iter().chain(absent) {
            table.claim(pod);
        }
        table
    }

    /// The first port of this pod that another one has.
    pub(crate) fn taken(&self, pod: &PodKey) -> Option<(u16, &'a PodKey)> {
        self.taken.get(pod).copied()
    }

    fn claim(&mut self, pod: &'a DesiredPod) {
        for (host_ip, port, protocol, _) in host_ports(pod) {
            match self.holder(host_ip, port, protocol) {
                Some(holder) if *holder != pod.key => {
                    self.taken.entry(&pod.key).or_insert((port, holder));
                }
                Some(_) => {}
                None => self.claims.entry((port, protocol)).or_default().push((host_ip, &pod.key)),
            }
        }
    }

    fn holder(&self, host_ip: Option<Ipv4Addr>, port: u16, protocol: &'static str) -> Option<&'a PodKey> {
        let claims = self.claims.get(&(port, protocol))?;
        let overlaps = |other: &Option<Ipv4Addr>| other.is_none() || host_ip.is_none() || *other == host_ip;
        claims.iter().find(|(ip, _)| overlaps(ip)).map(|(_, holder)| *holder)
    }

    fn holds(&self, pod: &PodKey, host_ip: Option<Ipv4Addr>, port: u16, protocol: &'static str) -> bool {
        self.holder(host_ip, port, protocol) == Some(pod)
    }
}

/// Every pod that has an address, in key order.
pub(crate) fn endpoints(desired: &Desired, observed: &Observed, ports: &PortTable<'_>) -> Vec<Endpoint> {
    addressed(desired, observed).map(|(pod, ip)| endpoint(pod, ip, ports)).collect()
}

/// What the endpoints are made from, hashed without making them: nearly always they have not changed. `None`: there
/// are none.
pub(crate) fn endpoints_hash(
    desired: &Desired,
    observed: &Observed,
    ports: &PortTable<'_>,
) -> Option<SpecHash> {
    let mut hasher = Hasher::default();
    let mut any = false;
    for (pod, ip) in addressed(desired, observed) {
        any = true;
        hasher.text(&pod.key.namespace).text(&pod.key.name).text(&pod.owner.name);
        hasher.text(pod.spec.hostname.as_deref().unwrap_or("")).number(u64::from(u32::from(ip)));
        let published =
            host_ports(pod).filter(|(ip, port, protocol, _)| ports.holds(&pod.key, *ip, *port, protocol));
        for (host_ip, host_port, protocol, container_port) in published {
            hasher.number(host_ip.map_or(0, |ip| u64::from(u32::from(ip)) + 1));
            hasher.number(u64::from(host_port) << 16 | u64::from(container_port)).text(protocol);
        }
    }
    any.then(|| hasher.finish())
}

fn addressed<'a>(
    desired: &'a Desired,
    observed: &'a Observed,
) -> impl Iterator<Item = (&'a DesiredPod, Ipv4Addr)> {
    let ready = observed.pods.values().filter(|seen| seen.ready);
    ready.filter_map(|seen| Some((current(desired, seen), seen.ip?)))
}

/// Ports and names change without a new pod, so the declaration counts as long as it is about the same sandbox.
fn current<'a>(desired: &'a Desired, seen: &'a ObservedPod) -> &'a DesiredPod {
    match desired.pods.get(&seen.pod.key) {
        Some(pod) if pod.sandbox_hash == seen.pod.sandbox_hash => pod,
        _ => &seen.pod,
    }
}

fn endpoint(pod: &DesiredPod, ip: Ipv4Addr, table: &PortTable<'_>) -> Endpoint {
    let mut ports: Vec<PublishedPort> = host_ports(pod)
        .filter(|(host_ip, port, protocol, _)| table.holds(&pod.key, *host_ip, *port, protocol))
        .map(|(host_ip, host_port, protocol, container_port)| PublishedPort {
            host_ip,
            host_port,
            container_port,
            protocol: protocol.to_owned(),
        })
        .collect();
    ports.sort();
    ports.dedup();
    Endpoint { pod: pod.key.clone(), id: pod.id.clone(), ip, names: names(pod), ports }
}

fn names(pod: &DesiredPod) -> Vec<String> {
    let own = [Some(&pod.key.name), Some(&pod.owner.name), pod.spec.hostname.as_ref()];
    let short: BTreeSet<&String> = own.into_iter().flatten().collect();
    let mut names: Vec<String> = Vec::with_capacity(2 * short.len());
    for name in short {
        names.push(name.clone());
        names.push(format!("{name}.{}", pod.key.namespace));
    }
    names
}

fn has_host_ports(pod: &DesiredPod) -> bool {
    pod.spec.containers.iter().any(|container| container.ports.iter().any(|port| port.host_port.is_some()))
}

/// (host address, host port, protocol, container port). An address that does not parse was refused with the manifest.
fn host_ports(pod: &DesiredPod) -> impl Iterator<Item = (Option<Ipv4Addr>, u16, &'static str, u16)> {
    pod.spec.containers.iter().flat_map(|container| &container.ports).filter_map(|port| {
        let host_ip: Option<Ipv4Addr> = port.host_ip.as_deref().and_then(|ip| ip.parse().ok());
        let host_ip = host_ip.filter(|ip| !ip.is_unspecified());
        Some((host_ip, port.host_port?, port.protocol.unwrap_or_default().as_str(), port.container_port))
    })
}
