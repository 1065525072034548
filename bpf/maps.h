/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The maps. Userspace makes and pins them (rama_ebpf/kernel/gate_maps.py says type, size and flags of each), so that
 * sizes are the operator's choice and a policy can outlive the programs; BCC opens them by their pins.
 */
#ifndef RAMA_EBPF_MAPS_H
#define RAMA_EBPF_MAPS_H

BPF_TABLE_PINNED("array", u32, struct gate, gate, 1, PIN_DIR "/gate");
BPF_TABLE_PINNED("hash", struct listener_key, struct listener, listeners, 1, PIN_DIR "/listeners");
BPF_TABLE_PINNED("lpm_trie", struct binding_key, u32, bindings, 1, PIN_DIR "/bindings");
BPF_TABLE_PINNED("lpm_trie", struct port_key, u32, bound_ports, 1, PIN_DIR "/bound_ports");
BPF_TABLE_PINNED("array", u32, struct listener, bound, 1, PIN_DIR "/bound"); /* by id: those with bindings */
BPF_TABLE_PINNED("sockmap", u32, u64, sockets, 1, PIN_DIR "/sockets");
BPF_TABLE_PINNED("array", u32, struct rule, rules, 1, PIN_DIR "/rules");
BPF_TABLE_PINNED("percpu_array", u32, struct rule_hits, rule_hits, 1, PIN_DIR "/rule_hits");
BPF_TABLE_PINNED("percpu_array", u32, u64, gate_stats, 1, PIN_DIR "/gate_stats");
BPF_TABLE_PINNED("percpu_array", u32, u64, established, 1, PIN_DIR "/established");
BPF_TABLE_PINNED("hash", struct ban_key, struct ban, bans, 1, PIN_DIR "/bans");
BPF_TABLE_PINNED("lpm_trie", struct failsafe_key, u32, failsafe, 1, PIN_DIR "/failsafe");
BPF_TABLE_PINNED("lpm_trie", struct failsafe_key, u32, egress, 1, PIN_DIR "/egress");
BPF_TABLE_PINNED("array", u32, u64, server_cgroup, 1, PIN_DIR "/server_cgroup"); /* id of the one not under egress policy */
BPF_TABLE_PINNED("hash", struct grant_key, u32, grants, 1, PIN_DIR "/grants");
BPF_TABLE_PINNED("lru_hash", struct peer_key, u32, datagram_peers, 1, PIN_DIR "/datagram_peers");
BPF_TABLE_PINNED("lru_hash", struct bucket_key, u64, buckets, 1, PIN_DIR "/buckets");
BPF_TABLE_PINNED("hash", struct runtime_key, u32, runtime, 1, PIN_DIR "/runtime");
BPF_TABLE_PINNED("percpu_array", u32, struct scratch, scratch, 1, PIN_DIR "/scratch");
BPF_TABLE_PINNED("array", u32, struct slot, slots, 4 * MAX_SLOTS, PIN_DIR "/slots");
BPF_TABLE_PINNED("array", u32, struct chain_item, chains, 2 * MAX_CHAIN_ITEMS, PIN_DIR "/chains");
BPF_TABLE_PINNED("hash", u32, struct interface, interfaces, 1, PIN_DIR "/interfaces");
BPF_TABLE_PINNED("array", u32, struct reject_meter, reject_meter, 1, PIN_DIR "/reject_meter");
BPF_TABLE_PINNED("percpu_array", u32, u64, silent_rejects, 1, PIN_DIR "/silent_rejects");
/* How many events a second on each CPU: nobody watches while the emission is 0. */
BPF_TABLE_PINNED("array", u32, struct limit, event_rate, 1, PIN_DIR "/event_rate");
BPF_TABLE_PINNED("percpu_array", u32, struct event_meter, event_meter, 1, PIN_DIR "/event_meter");
BPF_TABLE_PINNED("lru_hash", struct client_key, struct client, clients, 1, PIN_DIR "/clients");
BPF_TABLE_PINNED("percpu_array", u32, struct event_meter, client_meter, 1, PIN_DIR "/client_meter");
/* As BPF_RINGBUF_OUTPUT would declare it, which knows no pins. */
struct events_table {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PIN_DIR "/events"))) struct events_table events = { .max_entries = 4096 };

/* Two sets: gate.active says which one is in force, the other is where the next one is put. */
BPF_TABLE_PINNED("array_of_maps", u32, u32, sets, 2, PIN_DIR "/sets");

#endif
