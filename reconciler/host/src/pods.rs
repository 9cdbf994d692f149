//! Pods: record, namespaces, network, volumes, cgroup; and the network as all of them see it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use keel_cgroup::{Cpu, Memory, Resources};
use keel_engine::ports::Done;
use keel_manifest::model::DnsPolicy;
use keel_net::{HostsEntry, NamespaceKind, Net, NetConfig, Publish};
use keel_plan::{DesiredPod, Endpoint, PodId, PodKey, SpecHash};
use serde::{Deserialize, Serialize};

use crate::RealHost;
use crate::containers::private_dir;
use crate::error::HostError;
use crate::ids;
use crate::observe;
use crate::paths::Paths;
use crate::records::{PodRecord, RECORD_VERSION};
use crate::state::{
    At, Keep, PathError, names, read_json, remove_file, remove_tree, remove_tree_or_file, write_file,
    write_json,
};
use crate::volumes;

/// What pods have to share before any of them exists: the subnet. And what was last made of all of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    pub(crate) subnet: Option<String>,
    pub(crate) applied: Option<SpecHash>,
    #[serde(default)]
    pub(crate) endpoints: Vec<Endpoint>,
    /// The bridge that every pod was attached to.
    #[serde(default)]
    pub(crate) bridge: Option<u32>,
}

impl RealHost {
    /// The pod's record if it is still the incarnation that an action was planned against.
    pub(crate) fn current(&self, pod: &DesiredPod, incarnation: u64) -> Result<Option<PodRecord>, HostError> {
        let record = read_json::<PodRecord>(&self.paths.pod_record(&pod.id))?;
        Ok(record.filter(|record| record.incarnation == incarnation))
    }

    /// The record goes first, marked unfinished, so that whatever a crash leaves has a name to find it by.
    pub(crate) fn create_pod(&self, pod: &Arc<DesiredPod>) -> Result<Done, HostError> {
        let path = self.paths.pod_record(&pod.id);
        private_dir(&self.paths.pod(&pod.id))?;
        private_dir(&self.paths.pod_state(&pod.id))?;
        let mut record = match read_json::<PodRecord>(&path)? {
            Some(record) if record.pod.sandbox_hash == pod.sandbox_hash => {
                PodRecord { ready: false, pod: pod.clone(), ..record }
            }
            // Somebody else's pod by now: it is deleted by name, never built over.
            Some(record) if record.ready => return Ok(Done::Stale),
            _ => PodRecord {
                version: RECORD_VERSION,
                incarnation: self.new_incarnation(),
                created_at: observe::now(),
                ready: false,
                ip: None,
                first_id: None,
                pod: pod.clone(),
            },
        };
        {
            let _choosing = self.addresses.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if !pod.spec.host_network && record.ip.is_none() {
                record.ip = Some(self.choose_address(&pod.key)?);
            }
            if pod.spec.has_own_users() && record.first_id.is_none() {
                record.first_id = Some(ids::choose(&self.paths, &pod.id)?);
            }
            write_json(&path, &record, Keep::Boot)?;
        }

        if let Some(ip) = record.ip {
            self.check_ports(pod, ip)?;
        }
        self.create_namespaces(pod, record.ip, record.first_id)?;
        volumes::create(&self.paths, pod)?;
        self.write_network_files(pod, record.ip)?;
        self.create_cgroup(pod)?;
        if pod.spec.share_process_namespace && !pod.spec.host_pid {
            self.start_pod_init(pod, record.first_id)?;
        }
        record.ready = true;
        write_json(&path, &record, Keep::Boot)?;
        Ok(Done::Done)
    }

    pub(crate) fn delete_pod(&self, id: &PodId, incarnation: u64) -> Result<Done, HostError> {
        let path = self.paths.pod_record(id);
        let record = read_json::<PodRecord>(&path)?;
        if record.as_ref().is_some_and(|record| record.incarnation != incarnation) || self.has_runs(id)? {
            return Ok(Done::Stale);
        }
        self.remove_pod_init(id)?;
        let key = record.as_ref().map(|record| record.pod.key.to_string()).unwrap_or_else(|| id.to_string());
        let ns = self.paths.pod_namespaces(id);
        // The link goes with its namespace, without anyone waiting for it.
        keel_net::remove_namespaces(&ns).map_err(|source| network(&key, source))?;
        volumes::remove(&self.paths, id)?;
        self.remove_cgroup(id, &key)?;
        // Attempt numbers start again with a new pod: a late exit record must not speak for another run.
        let prefix = format!("{id}.");
        for name in names(&self.paths.exits())?.iter().filter(|name| name.starts_with(&prefix)) {
            remove_file(&self.paths.exits().join(name))?;
        }
        // The record last: until then the next round still knows that there is something to delete.
        for name in names(&self.paths.pod(id))? {
            if name != "pod.json" {
                remove_tree_or_file(&self.paths.pod(id).join(name))?;
            }
        }
        remove_file(&path)?;
        remove_tree(&self.paths.pod(id))?;
        Ok(Done::Done)
    }

    /// Whether any run that a planner knows of still has a directory.
    fn has_runs(&self, id: &PodId) -> Result<bool, PathError> {
        let prefix = format!("{id}.");
        let runs = names(&self.paths.containers())?.into_iter().filter(|name| name.starts_with(&prefix));
        Ok(runs.into_iter().any(|name| self.paths.container_record(&keel_plan::ContainerId(name)).exists()))
    }

    pub(crate) fn update_record(&self, pod: &Arc<DesiredPod>, incarnation: u64) -> Result<Done, HostError> {
        let Some(record) = self.current(pod, incarnation)? else { return Ok(Done::Stale) };
        let record = PodRecord { pod: pod.clone(), ..record };
        write_json(&self.paths.pod_record(&pod.id), &record, Keep::Boot)?;
        Ok(Done::Done)
    }

    pub(crate) fn sync_volumes(&self, pod: &Arc<DesiredPod>, incarnation: u64) -> Result<Done, HostError> {
        if self.current(pod, incarnation)?.is_none() {
            return Ok(Done::Stale);
        }
        volumes::sync(&self.paths, pod)?;
        self.update_record(pod, incarnation)
    }

    /// The packet filter as a whole, then every pod's hosts file. The record last: it claims that both are done.
    pub(crate) fn sync_network(&self, endpoints: &[Endpoint], hash: &SpecHash) -> Result<Done, HostError> {
        let mut record = self.network_record()?;
        let mut refused = None;
        let mut bridge = record.bridge;
        if !endpoints.is_empty() || record.subnet.is_some() {
            let net = self.net()?;
            let publish = |e: keel_net::NetError| HostError::Publish(Box::new(e));
            let there = net.ensure_bridge().map_err(publish)?.index;
            if bridge != Some(there) {
                self.attach_all(net)?;
                bridge = Some(there);
            }
            let (free, taken) = self.free_ports(net, endpoints, &record.endpoints);
            refused = taken;
            net.apply(&free).map_err(publish)?;
            record = self.network_record()?;
        }
        record.endpoints = endpoints.to_vec();
        record.bridge = bridge;
        for id in names(&self.paths.pods())? {
            let id = PodId(id);
            if let Some(found) = read_json::<PodRecord>(&self.paths.pod_record(&id))? {
                self.write_hosts(&found.pod, found.ip, &record.endpoints)?;
            }
        }
        record.applied = refused.is_none().then(|| hash.clone());
        if refused.is_some() {
            // What was refused is looked at again the next time.
            record.endpoints.iter_mut().for_each(|endpoint| endpoint.ports.clear());
        }
        write_json(&self.paths.network_record(), &record, Keep::Boot)?;
        refused.map_or(Ok(Done::Done), Err)
    }

    /// Published over a socket of the host, a port would take the clients of that socket away.
    fn check_ports(&self, pod: &DesiredPod, ip: Ipv4Addr) -> Result<(), HostError> {
        let wanted = pod.spec.containers.iter().flat_map(|container| &container.ports);
        for port in wanted {
            let Some(host_port) = port.host_port else { continue };
            let publish = Publish {
                host_ip: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
                host_port,
                ip,
                container_port: port.container_port,
                protocol: port
                    .protocol
                    .unwrap_or_default()
                    .as_str()
                    .parse()
                    .unwrap_or(keel_net::Protocol::Tcp),
            };
            let checked = self.net()?.check_port(&publish);
            checked
                .map_err(|source| HostError::Port { pod: pod.key.to_string(), source: Box::new(source) })?;
        }
        Ok(())
    }

    /// Ports that are published already, or whose place on the host is free; and why another one is left out.
    fn free_ports(
        &self,
        net: &Net,
        endpoints: &[Endpoint],
        before: &[Endpoint],
    ) -> (Vec<Publish>, Option<HostError>) {
        let published = lower_publish(before);
        let has = |publish: &Publish| {
            published.iter().any(|p| {
                (p.host_ip, p.host_port, p.protocol) == (publish.host_ip, publish.host_port, publish.protocol)
            })
        };
        let (mut free, mut refused) = (Vec::new(), None);
        for endpoint in endpoints {
            for publish in lower_publish(std::slice::from_ref(endpoint)) {
                match if has(&publish) { Ok(()) } else { net.check_port(&publish) } {
                    Ok(()) => free.push(publish),
                    Err(source) => {
                        let pod = endpoint.pod.to_string();
                        refused = Some(HostError::Port { pod, source: Box::new(source) });
                    }
                }
            }
        }
        (free, refused)
    }

    /// After somebody has removed the bridge: the pods' links are still there, and lead nowhere.
    fn attach_all(&self, net: &Net) -> Result<(), HostError> {
        for id in names(&self.paths.pods())? {
            let id = PodId(id);
            let record = read_json::<PodRecord>(&self.paths.pod_record(&id))?.filter(|record| record.ready);
            let netns = self.paths.pod_namespaces(&id).join("net");
            if let Some(PodRecord { pod, ip: Some(ip), .. }) = record
                && observe::is_namespace(&netns)
            {
                net.attach(&id.0, &netns, ip).map_err(|source| network(&pod.key.to_string(), source))?;
            }
        }
        Ok(())
    }

    /// What the packet filter was last made from; nothing when somebody has flushed it since.
    pub(crate) fn observed_network(&self) -> Result<Option<SpecHash>, HostError> {
        let record = self.network_record()?;
        if record.applied.is_none() || record.subnet.is_none() {
            return Ok(record.applied);
        }
        let publish = lower_publish(&record.endpoints);
        let failed = |source: keel_net::NetError| HostError::Publish(Box::new(source));
        let net = self.net()?;
        let intact = net.bridge_index().map_err(failed)? == record.bridge
            && record.bridge.is_some()
            && net.in_sync(&publish).map_err(failed)?;
        Ok(record.applied.filter(|_| intact))
    }

    pub(crate) fn network_record(&self) -> Result<NetworkRecord, PathError> {
        Ok(read_json(&self.paths.network_record())?.unwrap_or_default())
    }

    /// The network, set up when the first pod needs it: a host whose pods all use the host's own gets no bridge.
    pub(crate) fn net(&self) -> Result<&Net, HostError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| HostError::Publish(source);
        self.net.get_or_try_init(|| {
            let mut record = self.network_record()?;
            let tag =
                if self.paths.tag().is_empty() { String::new() } else { format!("-{}", self.paths.tag()) };
            let recorded = record.subnet.as_deref().and_then(|text| text.parse().ok());
            let subnet = match self.config.subnet.or(recorded) {
                Some(subnet) => subnet,
                None => {
                    let used = keel_net::observe_used_subnets(&self.paths.bridge_name())
                        .map_err(|e| failed(Box::new(e)))?;
                    keel_net::choose_subnet(&tag, &used).map_err(|e| failed(Box::new(e)))?
                }
            };
            record.subnet = Some(subnet.to_string());
            write_json(&self.paths.network_record(), &record, Keep::Boot)?;
            let net = Net::open(NetConfig::new(&tag, subnet)).map_err(|e| failed(Box::new(e)))?;
            net.ensure_bridge().map_err(|e| failed(Box::new(e)))?;
            // Links of pods that are gone, whose namespace a stray process keeps.
            let live = names(&self.paths.pods())?.into_iter().collect();
            net.sweep(&live).map_err(|e| failed(Box::new(e)))?;
            for chain in net.forward_drops().map_err(|e| failed(Box::new(e)))? {
                tracing::warn!(
                    "the packet-filter chain {chain} drops forwarded packets: published ports and the pods' way out may not \
                     work (hint: {})",
                    chain.remedy(&net.config().bridge)
                );
            }
            Ok(net)
        })
    }

    fn choose_address(&self, key: &PodKey) -> Result<Ipv4Addr, HostError> {
        let mut taken: BTreeMap<PodKey, Ipv4Addr> = BTreeMap::new();
        for id in names(&self.paths.pods())? {
            if let Some(record) = read_json::<PodRecord>(&self.paths.pod_record(&PodId(id)))?
                && let Some(ip) = record.ip
            {
                taken.insert(record.pod.key.clone(), ip);
            }
        }
        let subnet = self.net()?.config().subnet;
        let assigned = keel_net::assign(std::slice::from_ref(key), &taken, subnet)
            .map_err(|source| network(&key.to_string(), source))?;
        assigned
            .get(key)
            .copied()
            .ok_or_else(|| network(&key.to_string(), io::Error::other("no address assigned")))
    }

    fn create_namespaces(
        &self,
        pod: &DesiredPod,
        ip: Option<Ipv4Addr>,
        first_id: Option<u32>,
    ) -> Result<(), HostError> {
        let dir = self.paths.pod_namespaces(&pod.id);
        let key = pod.key.to_string();
        let mut kinds = Vec::new();
        if !pod.spec.host_network {
            kinds.extend([NamespaceKind::Net, NamespaceKind::Uts]);
        }
        if !pod.spec.host_ipc {
            kinds.push(NamespaceKind::Ipc);
        }
        if let Some(process) = self.living_process(&pod.id)? {
            let user = first_id.map(|_| NamespaceKind::User);
            let kinds: Vec<_> = kinds.iter().copied().chain(user).collect();
            keel_net::pin_namespaces_of(&dir, &kinds, process.as_fd())
                .map_err(|source| network(&key, source))?;
        }
        if let Some(first) = first_id {
            keel_net::create_owned_namespaces(&dir, &kinds, first, ids::RANGE)
                .map_err(|source| network(&key, source))?;
        }
        keel_net::create_namespaces(&dir, &kinds, &self.hostname(pod))
            .map_err(|source| network(&key, source))?;
        match ip {
            Some(ip) => {
                let net = self.net()?;
                net.ensure_bridge().map_err(|source| network(&key, source))?;
                net.attach(&pod.id.0, &dir.join("net"), ip).map_err(|source| network(&key, source))?;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A process that lives in the pod's namespaces, as its directory in `/proc`.
    fn living_process(&self, id: &PodId) -> Result<Option<File>, PathError> {
        let prefix = format!("{id}.");
        for run in names(&self.paths.containers())?.iter().filter(|name| name.starts_with(&prefix)) {
            let path = self.paths.container(&keel_plan::ContainerId(run.clone())).join("pid");
            let Some(mark) = observe::read_mark(&path)? else { continue };
            let Ok(process) = File::open(format!("/proc/{}", mark.pid)) else { continue };
            // Asked after the directory was opened: it is that process, or nothing any more.
            if observe::is_alive(mark) {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    fn create_cgroup(&self, pod: &DesiredPod) -> Result<(), HostError> {
        let cgroup = self.cgroups.cgroup(&self.paths.pod_cgroup(&pod.id));
        cgroup
            .and_then(|cgroup| cgroup.create().and_then(|()| cgroup.apply(&pod_limits(pod))))
            .map_err(|source| HostError::Cgroup { pod: pod.key.to_string(), source: Box::new(source) })
    }

    fn remove_cgroup(&self, id: &PodId, pod: &str) -> Result<(), HostError> {
        let cgroup = self.cgroups.cgroup(&self.paths.pod_cgroup(id));
        cgroup
            .and_then(|cgroup| if cgroup.exists() { cgroup.remove() } else { Ok(()) })
            .map_err(|source| HostError::Cgroup { pod: pod.to_string(), source: Box::new(source) })
    }

    fn write_network_files(&self, pod: &DesiredPod, ip: Option<Ipv4Addr>) -> Result<(), HostError> {
        let record = self.network_record()?;
        self.write_hosts(pod, ip, &record.endpoints)?;
        let policy = pod.spec.dns_policy.unwrap_or_default();
        let config = pod.spec.dns_config.as_ref();
        let dns = keel_net::Dns {
            host_servers: policy != DnsPolicy::None,
            nameservers: config.map(|c| c.nameservers.clone()).unwrap_or_default(),
            searches: config.map(|c| c.searches.clone()).unwrap_or_default(),
            options: config
                .map(|c| {
                    c.options
                        .iter()
                        .map(|option| match &option.value {
                            Some(value) => format!("{}:{value}", option.name),
                            None => option.name.clone(),
                        })
                        .collect()
                })
                .unwrap_or_default(),
        };
        let text = match pod.spec.host_network {
            true => keel_net::render_host_network_resolv_conf(&host_resolv_conf(), &dns),
            false => keel_net::render_resolv_conf(&host_resolv_conf(), &dns),
        };
        readable_file(&self.paths.pod_file(&pod.id, "resolv.conf"), text.as_bytes())?;
        let name = format!("{}\n", self.hostname(pod));
        readable_file(&self.paths.pod_file(&pod.id, "hostname"), name.as_bytes())?;
        Ok(())
    }

    fn write_hosts(
        &self,
        pod: &DesiredPod,
        ip: Option<Ipv4Addr>,
        endpoints: &[Endpoint],
    ) -> Result<(), PathError> {
        let aliases: Vec<HostsEntry> = pod
            .spec
            .host_aliases
            .iter()
            .filter_map(|alias| {
                Some(HostsEntry { ip: alias.ip.parse::<IpAddr>().ok()?, names: alias.hostnames.clone() })
            })
            .collect();
        let peers: Vec<HostsEntry> = endpoints
            .iter()
            .filter(|endpoint| endpoint.pod != pod.key)
            .map(|endpoint| HostsEntry {
                ip: IpAddr::V4(endpoint.ip),
                names: endpoint
                    .names
                    .iter()
                    // Short names are for neighbours; from another namespace the qualified ones lead here.
                    .filter(|name| name.contains('.') || endpoint.pod.namespace == pod.key.namespace)
                    .cloned()
                    .collect(),
            })
            .filter(|entry| !entry.names.is_empty())
            .collect();
        let text = match ip {
            Some(ip) => keel_net::render_hosts(Some(IpAddr::V4(ip)), &self.hostname(pod), &aliases, &peers),
            // On the host's network the host's own names go on to hold.
            None => {
                let own = fs::read_to_string("/etc/hosts").unwrap_or_default();
                format!("{own}{}", keel_net::render_hosts_entries(&aliases, &peers))
            }
        };
        rewrite_in_place(&self.paths.pod_file(&pod.id, "hosts"), text.as_bytes())
    }

    /// Host name inside the pod.
    pub(crate) fn hostname(&self, pod: &DesiredPod) -> String {
        if pod.spec.host_network {
            return self.facts.node_name.clone();
        }
        pod.spec.hostname.clone().unwrap_or_else(|| pod.key.name.chars().take(MAX_HOSTNAME).collect())
    }

    /// Differs from every earlier one of this pod: a delete names it.
    fn new_incarnation(&self) -> u64 {
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX));
        nanos ^ u64::from(std::process::id()).rotate_left(48)
    }

    /// On tmpfs, for the next daemon.
    pub(crate) fn save_pod_memory(
        &self,
        id: &PodId,
        memory: Option<&keel_plan::PodMemory>,
    ) -> Result<(), HostError> {
        let path = self.paths.pod_run_memory(id);
        match memory {
            Some(memory) => write_json(&path, memory, Keep::Boot)?,
            None => remove_file(&path)?,
        }
        Ok(())
    }

    /// On disk, where replacing a file costs a flush, at first and then only once there is something to count.
    pub(crate) fn keep_pod_memory(
        &self,
        id: &PodId,
        memory: Option<&keel_plan::PodMemory>,
    ) -> Result<(), HostError> {
        match memory {
            Some(memory) => {
                let on_disk = self.paths.pod_memory(id);
                let counted = memory.containers.values().any(|container| container.restarts > 0);
                if counted || !on_disk.exists() {
                    private_dir(&self.paths.pod_state(id))?;
                    write_json(&on_disk, memory, if counted { Keep::Durable } else { Keep::Boot })?;
                }
            }
            None => {
                remove_tree(&self.paths.pod_state(id))?;
                remove_tree(&self.paths.pod_logs(id))?;
                self.forget_good(id)?;
            }
        }
        Ok(())
    }
}

/// Linux host names hold 64 bytes (uname(2)); Kubernetes cuts at 63.
const MAX_HOSTNAME: usize = 63;

fn lower_publish(endpoints: &[Endpoint]) -> Vec<Publish> {
    let of = |endpoint: &Endpoint| {
        let ip = endpoint.ip;
        endpoint.ports.clone().into_iter().map(move |port| Publish {
            host_ip: port.host_ip,
            host_port: port.host_port,
            ip,
            container_port: port.container_port,
            protocol: port.protocol.parse().unwrap_or(keel_net::Protocol::Tcp),
        })
    };
    endpoints.iter().flat_map(of).collect()
}

/// The sum of the containers' limits, where every container has one.
fn pod_limits(pod: &DesiredPod) -> Resources {
    use crate::spec::{CPU_PERIOD_US, Wanted, cpu_quota, cpu_shares};
    let wanted: Vec<Wanted> = pod.spec.containers.iter().map(Wanted::of).collect();
    let sum = |pick: fn(&Wanted) -> Option<u64>| wanted.iter().map(pick).sum::<Option<u64>>();
    let request: u64 = wanted.iter().filter_map(|w| w.cpu_request.or(w.cpu_limit)).sum();
    let quota = sum(|w| w.cpu_limit).map(cpu_quota);
    Resources {
        memory: sum(|w| w.memory_limit)
            .map(|bytes| Memory { limit: i64::try_from(bytes).ok(), ..Memory::default() }),
        cpu: Some(Cpu {
            shares: Some(cpu_shares((request > 0).then_some(request))),
            quota,
            period: quota.map(|_| CPU_PERIOD_US),
            ..Cpu::default()
        }),
        ..Resources::default()
    }
}

fn network<E: std::error::Error + Send + Sync + 'static>(pod: &str, source: E) -> HostError {
    HostError::Network { pod: pod.to_string(), source: Box::new(source) }
}

/// systemd-resolved's stub listens on the host's loopback, which a pod does not reach: then the file with the real servers.
fn host_resolv_conf() -> String {
    keel_net::host_resolv_conf(Path::new("/etc/resolv.conf"), Path::new("/run/systemd/resolve/resolv.conf"))
}

/// Containers with any user read these.
fn readable_file(path: &Path, contents: &[u8]) -> Result<(), PathError> {
    use std::os::unix::fs::PermissionsExt;
    write_file(path, contents, Keep::Boot)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).at("change mode of", path)
}

/// The same inode, since it is bound into containers: a rename would leave them with the old file.
fn rewrite_in_place(path: &Path, contents: &[u8]) -> Result<(), PathError> {
    if fs::read(path).is_ok_and(|found| found == contents) {
        return Ok(());
    }
    if !path.exists() {
        return readable_file(path, contents);
    }
    let file = OpenOptions::new().write(true).open(path).at("open", path)?;
    file.write_all_at(contents, 0).at("write", path)?;
    file.set_len(contents.len() as u64).at("truncate", path)
}

/// Everything that this instance has in the kernel and on tmpfs, undone. Containers must be gone already.
pub fn purge_network(paths: &Paths) -> Result<(), HostError> {
    let record: NetworkRecord = read_json(&paths.network_record())?.unwrap_or_default();
    if let Some(subnet) = record.subnet.as_deref().and_then(|text| text.parse().ok()) {
        let tag = if paths.tag().is_empty() { String::new() } else { format!("-{}", paths.tag()) };
        let net = Net::open(NetConfig::new(&tag, subnet)).map_err(|e| HostError::Publish(Box::new(e)))?;
        net.purge().map_err(|e| HostError::Publish(Box::new(e)))?;
    }
    remove_file(&paths.network_record())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_full_disk_never_shortens_what_containers_read() {
        let dir = tempfile::tempdir().unwrap();
        let size = Some("size=8k");
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), size).unwrap();
        let path = dir.path().join("hosts");
        rewrite_in_place(&path, &[b'a'; 4096]).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let refused = rewrite_in_place(&path, &[b'a'; 64 << 10]);
        let kept = fs::read(&path).unwrap();
        let shorter = rewrite_in_place(&path, b"short");
        let (after, same) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().ino() == inode);
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
        assert!(refused.is_err());
        assert!(kept.starts_with(&[b'a'; 4096]), "{}", kept.len());
        assert!(shorter.is_ok() && same);
        assert_eq!(after, b"short");
    }
}
