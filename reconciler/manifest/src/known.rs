//! What Kubernetes has and this version does not do.
//!
//! A name that is here gives "not done yet" or "no effect on one host" instead of "unknown". A field that is in the
//! model and here is refused all the same: delete its name here on the day that it works.

/// Fields of one type of the model.
pub(crate) struct KnownFields {
    pub type_name: &'static str,
    /// Refused by name.
    pub not_yet: &'static [&'static str],
    /// Accepted with a warning.
    pub no_effect: &'static [&'static str],
}

const METADATA_NO_EFFECT: &[&str] = &[
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

pub(crate) const FIELDS: &[KnownFields] = &[
    KnownFields { type_name: "Pod", not_yet: &[], no_effect: &["status"] },
    KnownFields { type_name: "Deployment", not_yet: &[], no_effect: &["status"] },
    KnownFields { type_name: "ObjectMeta", not_yet: &["generateName"], no_effect: METADATA_NO_EFFECT },
    KnownFields { type_name: "TemplateMeta", not_yet: &["generateName"], no_effect: METADATA_NO_EFFECT },
    KnownFields {
        type_name: "DeploymentSpec",
        not_yet: &["minReadySeconds", "paused"],
        no_effect: &["progressDeadlineSeconds", "revisionHistoryLimit"],
    },
    KnownFields {
        type_name: "PodSpec",
        not_yet: &[
            "activeDeadlineSeconds",
            "ephemeralContainers",
            "evictionResponders",
            "hostnameOverride",
            "readinessGates",
            "resourceClaims",
            "resources",
            "runtimeClassName",
            "setHostnameAsFQDN",
            "subdomain",
            "workloadRef",
        ],
        no_effect: &[
            "affinity",
            "automountServiceAccountToken",
            "enableServiceLinks",
            "nodeName",
            "nodeSelector",
            "os",
            "overhead",
            "preemptionPolicy",
            "priority",
            "priorityClassName",
            "schedulerName",
            "schedulingGates",
            "schedulingGroup",
            "serviceAccount",
            "serviceAccountName",
            "tolerations",
            "topologySpreadConstraints",
        ],
    },
    KnownFields {
        type_name: "Container",
        not_yet: &["lifecycle", "resizePolicy", "restartPolicy", "restartPolicyRules", "volumeDevices"],
        no_effect: &["terminationMessagePath", "terminationMessagePolicy"],
    },
    KnownFields { type_name: "EnvVarSource", not_yet: &["fileKeyRef"], no_effect: &[] },
    KnownFields {
        type_name: "VolumeMount",
        not_yet: &["bindMountOptions", "mountPropagation", "recursiveReadOnly", "subPathExpr"],
        no_effect: &[],
    },
    KnownFields {
        type_name: "Volume",
        not_yet: &[
            "awsElasticBlockStore",
            "azureDisk",
            "azureFile",
            "cephfs",
            "cinder",
            "csi",
            "downwardAPI",
            "ephemeral",
            "fc",
            "flexVolume",
            "flocker",
            "gcePersistentDisk",
            "gitRepo",
            "glusterfs",
            "image",
            "iscsi",
            "nfs",
            "persistentVolumeClaim",
            "photonPersistentDisk",
            "portworxVolume",
            "projected",
            "quobyte",
            "rbd",
            "scaleIO",
            "storageos",
            "vsphereVolume",
        ],
        no_effect: &[],
    },
    KnownFields { type_name: "EmptyDirVolume", not_yet: &["mode"], no_effect: &[] },
    KnownFields { type_name: "Resources", not_yet: &["claims"], no_effect: &[] },
    KnownFields {
        type_name: "PodSecurityContext",
        not_yet: &[
            "appArmorProfile",
            "seLinuxOptions",
            "supplementalGroupsPolicy",
            "sysctls",
            "windowsOptions",
        ],
        no_effect: &["fsGroupChangePolicy", "seLinuxChangePolicy"],
    },
    KnownFields {
        type_name: "SecurityContext",
        not_yet: &["appArmorProfile", "procMount", "seLinuxOptions", "windowsOptions"],
        no_effect: &[],
    },
    KnownFields { type_name: "Probe", not_yet: &["grpc"], no_effect: &[] },
    KnownFields { type_name: "LifecycleHandler", not_yet: &["tcpSocket"], no_effect: &[] },
];

/// A kind and the version that it has in current Kubernetes.
pub(crate) struct KnownKind {
    pub kind: &'static str,
    pub api_version: &'static str,
    pub state: KindState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KindState {
    Runs,
    /// Refused by name.
    NotYet,
    /// Accepted with a warning: has no meaning on one host.
    NoMeaning,
}

const fn kind(kind: &'static str, api_version: &'static str, state: KindState) -> KnownKind {
    KnownKind { kind, api_version, state }
}

const RBAC: &str = "rbac.authorization.k8s.io/v1";

pub(crate) const KINDS: &[KnownKind] = &[
    kind("ConfigMap", "v1", KindState::Runs),
    kind("Deployment", "apps/v1", KindState::Runs),
    kind("Pod", "v1", KindState::Runs),
    kind("Secret", "v1", KindState::Runs),
    kind("CronJob", "batch/v1", KindState::NotYet),
    kind("DaemonSet", "apps/v1", KindState::NotYet),
    kind("Job", "batch/v1", KindState::NotYet),
    kind("NetworkPolicy", "networking.k8s.io/v1", KindState::NotYet),
    kind("PersistentVolume", "v1", KindState::NotYet),
    kind("PersistentVolumeClaim", "v1", KindState::NotYet),
    kind("ReplicaSet", "apps/v1", KindState::NotYet),
    kind("ReplicationController", "v1", KindState::NotYet),
    kind("Service", "v1", KindState::NotYet),
    kind("StatefulSet", "apps/v1", KindState::NotYet),
    kind("ClusterRole", RBAC, KindState::NoMeaning),
    kind("ClusterRoleBinding", RBAC, KindState::NoMeaning),
    kind("EndpointSlice", "discovery.k8s.io/v1", KindState::NoMeaning),
    kind("Endpoints", "v1", KindState::NoMeaning),
    kind("HorizontalPodAutoscaler", "autoscaling/v2", KindState::NoMeaning),
    kind("Ingress", "networking.k8s.io/v1", KindState::NoMeaning),
    kind("IngressClass", "networking.k8s.io/v1", KindState::NoMeaning),
    kind("LimitRange", "v1", KindState::NoMeaning),
    kind("Namespace", "v1", KindState::NoMeaning),
    kind("PodDisruptionBudget", "policy/v1", KindState::NoMeaning),
    kind("PriorityClass", "scheduling.k8s.io/v1", KindState::NoMeaning),
    kind("ResourceQuota", "v1", KindState::NoMeaning),
    kind("Role", RBAC, KindState::NoMeaning),
    kind("RoleBinding", RBAC, KindState::NoMeaning),
    kind("RuntimeClass", "node.k8s.io/v1", KindState::NoMeaning),
    kind("ServiceAccount", "v1", KindState::NoMeaning),
    kind("StorageClass", "storage.k8s.io/v1", KindState::NoMeaning),
];

pub(crate) fn fields(type_name: &str) -> Option<&'static KnownFields> {
    FIELDS.iter().find(|f| f.type_name == type_name)
}

pub(crate) fn kind_named(name: &str) -> Option<&'static KnownKind> {
    KINDS.iter().find(|k| k.kind == name)
}

/// The candidate that a mistyped name most likely means.
pub(crate) fn nearest<'a>(written: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain =
        |text: &str| text.chars().filter(|c| *c != '_' && *c != '-').collect::<String>().to_lowercase();
    let wanted = plain(written);
    // Names that long are not typing mistakes, and the distance costs the product of the lengths.
    if wanted.len() > 64 {
        return None;
    }
    let allowed = (wanted.len() / 3).clamp(1, 3);
    candidates
        .map(|c| (strsim::damerau_levenshtein(&wanted, &plain(c)), c))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, c)| c)
}
