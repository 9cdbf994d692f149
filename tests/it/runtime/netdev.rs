//! `linux.netDevices`, inside a network namespace of the test's own: nothing of it is on the host.

use super::*;

/// Runs the case in a namespace that has the veth pair `vx`-`vy`, with an address of each family.
fn run(case: &Case) -> Output {
    let bundle = case.bundle();
    let mut inner = case.command(&["run", "--bundle", &bundle, &case.id]);
    let words: Vec<String> = std::iter::once(inner.get_program())
        .chain(inner.get_args())
        .map(|w| w.to_str().unwrap().to_owned())
        .collect();
    inner = Command::new("unshare");
    let script = "ip link add vx mtu 1400 address 02:00:00:00:00:07 type veth peer name vy && \
        ip addr add 10.9.8.7/24 brd 10.9.8.255 dev vx && ip -6 addr add fd00:9::7/64 dev vx nodad && \
        ip link set vy up && ip link set vx up && exec \"$@\"";
    inner.args(["--net", "sh", "-c", script, "sh"]).args(words).stdin(Stdio::null()).output().unwrap()
}

fn output(case: &Case) -> String {
    let output = run(case);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn with_device(script: &str, devices: Value) -> Case {
    Case::new(script).with("/linux/netDevices", devices)
}

#[test]
fn a_device_moves_in_under_its_new_name_with_its_addresses_and_goes_up() {
    require!(ours);
    let script = "cd /sys/class/net/eth7 && cat mtu address operstate; \
        /bin/busybox ip -o addr show eth7 | grep -o 'inet.*global' | cut -d' ' -f1-4";
    assert_eq!(
        output(&with_device(script, json!({"vx": {"name": "eth7"}}))),
        "1400\n02:00:00:00:00:07\nup\ninet 10.9.8.7/24 brd 10.9.8.255\ninet6 fd00:9::7/64 scope global\n"
    );
}

#[test]
fn a_device_keeps_its_name_or_gets_a_number() {
    require!(ours);
    assert!(output(&with_device("ls /sys/class/net", json!({"vx": {}}))).contains("vx"));
    let listed =
        output(&with_device("ls /sys/class/net", json!({"vx": {"name": "net%d"}, "vy": {"name": "net%d"}})));
    assert!(listed.contains("net0") && listed.contains("net1"), "{listed}");
}

#[test]
fn a_device_that_cannot_be_moved_is_named_and_nothing_is_left() {
    require!(ours);
    for (devices, word) in [
        (json!({"absent": {}}), "absent"),
        (json!({"vx": {"name": "lo"}}), "vx as lo"),
        (json!({"lo": {"name": "lo2"}}), "lo as lo2"),
        (json!({"vx": {"name": "same"}, "vy": {"name": "same"}}), "same"),
    ] {
        let case = in_cgroup(with_device("true", devices));
        let output = run(&case);
        assert!(!output.status.success(), "{word}");
        let error = text(&output.stderr);
        assert!(error.contains("linux.netDevices") && error.contains(word), "{error}");
        case.assert_gone();
    }
    let case = with_device("true", json!({"vx": {}})).without_namespace("network");
    let error = text(&run(&case).stderr);
    assert!(error.contains("linux.netDevices: needs a network namespace"), "{error}");
}
