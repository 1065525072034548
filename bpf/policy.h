/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Every structure and constant that the kernel programs share with userspace. rama_ebpf/kernel/abi.py reads the
 * enumerations and the layouts of the structures from this very file. It names the members in the order in which it packs
 * them, so nothing starts with a file that has another order.
 *
 * Addresses are in network byte order, everything else in host byte order. Times are CLOCK_BOOTTIME nanoseconds.
 */
#ifndef RAMA_EBPF_POLICY_H
#define RAMA_EBPF_POLICY_H

/* Changes whenever a map's meaning does: pins with another number are not reused. */
enum layout { LAYOUT_VERSION = 5 };

/* What is decided for a connection attempt. */
enum action {
	ACTION_NONE   = 0, /* no rule decided */
	ACTION_ALLOW  = 1,
	ACTION_DROP   = 2, /* silence: no SYN-ACK, no RST */
	ACTION_REJECT = 3, /* RST */
	ACTION_LIMIT  = 4, /* a rule's action only: a verdict is ALLOW within the rate and DROP above it */
};

/* Which part of the policy decided. */
enum stage {
	STAGE_NONE     = 0, /* not for one of our listeners */
	STAGE_FAILSAFE = 1,
	STAGE_BAN      = 2,
	STAGE_RULE     = 3,
	STAGE_LIMIT    = 4, /* a rule's limit, or the per-source or global SYN limit, was exceeded */
	STAGE_DEFAULT  = 5,
	STAGE_PARSE    = 6, /* the headers could not be followed */
};

/* Where it was decided. */
enum hook {
	HOOK_CGROUP = 0, /* cgroup_skb ingress */
	HOOK_LOOKUP = 1, /* sk_lookup */
	HOOK_XDP    = 2,
	HOOK_COUNT  = 3,
};

enum egress_flag {
	EGRESS_DENY       = 1,
	EGRESS_NAMESERVER = 2, /* whose port 53 is open all the same */
	EGRESS_OWN        = 4, /* of this host: the proxy's own listeners are denied there */
};

enum rule_flag {
	RULE_DRY_RUN = 1,
	RULE_CERTAIN = 2, /* for any port, without an end, no dry run: if it is reached it decides */
};

/* What there is to look up: a look-up that can find nothing is not made. */
enum gate_flag {
	GATE_BANS          = 1,
	GATE_FAILSAFE      = 2,
	GATE_RUNTIME_PORTS = 4, /* some runtime rule is for one port */
};

/*
 * An entry of the failsafe, for lists 0 and 1: whether list n covers its network (bit n), and whether it names it (bit
 * 2 + n). A look-up finds the longest prefix of either list, and what that says of one is so for all shorter ones.
 */
enum failsafe_bit { FAILSAFE_COVERED = 1, FAILSAFE_NAMED = 4 };

enum bound {
	MAX_LISTENERS        = 1024,
	MAX_BOUND_PREFIXES   = 4096,  /* of all listeners' bindings together */
	MAX_BOUND_PORTS      = 65536, /* prefixes of ports, of which a range takes 30 at most */
	MAX_INTERFACES       = 64, /* with gate_xdp */
	SOCKETS_PER_LISTENER = 64,
	MAX_FAILSAFE_PORTS   = 8,
	MAX_DATAGRAM_PEERS   = 65536, /* of all workers' sockets together */
	MAX_CLIENTS          = 65536, /* of whom it is kept what became of them; the oldest make room */
	MAX_CHAIN            = 64, /* rules of the set that may apply to one address before one is certain to decide */
	MAX_RUNTIME_LENGTHS  = 64, /* different prefix lengths that the runtime layer has of one family */
	MAX_BAN_LENGTHS      = 4,  /* different prefix lengths that bans of one family have */
	ACTION_COUNT         = 5,
	STAGE_COUNT          = 7,
};

/* An IPv4 address is kept as IPv4-mapped where both families share a map. */
struct address {
	union {
		__u8 b[16];
		__u64 half[2];
	};
} __attribute__((packed, aligned(4)));

struct listener_key {
	struct address addr; /* 0.0.0.0 (mapped) or ::, any address of that family */
	__u16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct listener_key) == 20, "listener_key");

enum listener_state {
	LISTENER_OPEN   = 0,
	LISTENER_CLOSED = 1, /* no SYN gets in, whatever the policy: silence, so that the client tries again */
	LISTENER_HOME   = 2, /* where the sockets of a listener with bindings are bound: nobody gets in by that address */
};

struct listener {
	__u16 id;      /* < MAX_LISTENERS */
	__u16 sockets; /* how many slots of the SOCKMAP, from id * SOCKETS_PER_LISTENER, are filled; 0: RST for all */
	__u32 state;   /* enum listener_state */
};
_Static_assert(sizeof(struct listener) == 8, "listener");

/*
 * A listener with bindings serves sets of addresses and ports by sockets that are bound to none of them. A prefix leads to
 * a table of ports, which has the ports of shorter prefixes in it where it leaves them to these (kernel/bindings.py makes
 * it), and a port there to the listener, in the map `bound`. So the most specific binding is found by two look-ups.
 */
struct binding_key {
	__u32 plen; /* of all that follows */
	__u32 ipv4; /* ::/0 does not cover IPv4 */
	struct address addr;
};
_Static_assert(sizeof(struct binding_key) == 24, "binding_key");

struct port_key {
	__u32 plen; /* of all that follows */
	__u32 table;
	__u16 port; /* network byte order: its first bits are the upper ones */
	__u16 pad;
};
_Static_assert(sizeof(struct port_key) == 12, "port_key");

/*
 * The rank of a rule among all that apply to a packet: the highest decides. The upper part is the length of the
 * prefix that matched, the lower four bits are `order` of the rule.
 */
enum rank { RANK_LENGTH_SHIFT = 4, ORDER_PORT = 8, ORDER_PRECEDENCE = 2, ORDER_RUNTIME = 1 };

struct rule {
	__u32 action;
	__u32 flags;
	__u64 expires; /* 0: never */
	__u64 emission; /* limit: nanoseconds between two admitted SYNs at the sustained rate */
	__u64 tolerance; /* limit: emission * (burst - 1) */
	__u16 port; /* 0: any */
	__u16 order;
	__u32 pad;
};
_Static_assert(sizeof(struct rule) == 40, "rule");

/* The runtime layer: one rule for each prefix and port, changed one by one. */
struct runtime_key {
	__u16 length; /* bits of the IPv4-mapped form */
	__u16 port; /* 0: any */
	struct address prefix;
};
/* Which prefix lengths the runtime layer has: bit n for length n, in the lowest word 0 to 63. */
struct lengths {
	__u64 bits[3];
};
_Static_assert(sizeof(struct runtime_key) == 20, "runtime_key");

/*
 * The set: everything that was loaded at once, and never changed while it is in force. Each family's addresses are cut
 * into intervals to all of whose addresses the same rules apply. An index of equal slots leads to the few intervals
 * that a slot's addresses fall into, and a bisection to the one. Its value is a chain: the rules that apply, the
 * highest rank first, up to the first that is certain to decide.
 *
 * Slots and chains of both sets are in the maps `slots` and `chains`, the intervals in an array of pages for each set.
 */
enum page { PAGE_BYTES = 4096 };

enum set_size { MAX_SLOTS = 65536, MAX_CHAIN_ITEMS = 65536 };

struct slot {
	__u32 first; /* interval; if count is 0, the value of all the slot's addresses */
	__u32 count;
};
_Static_assert(sizeof(struct slot) == 8, "slot");

/* An interval's value is where its chain begins. Value 0 is no chain. */
struct chain_item {
	__u32 rule;
	__u16 length; /* of the prefix, in the IPv4-mapped form */
	__u16 end;    /* 1: the chain's last */
};
_Static_assert(sizeof(struct chain_item) == 8, "chain_item");

/* How an interval is kept. Its value takes 16 bits, and within a slot the upper bits of its first address are known. */
enum layout_kind {
	LAYOUT_SHORT = 0, /* IPv4: the address's lower 16 bits, and the value, in 32 */
	LAYOUT_LONG  = 1, /* IPv6 without prefixes longer than /64: the upper half's lower 48 bits, and the value, in 64 */
	LAYOUT_FULL  = 2, /* IPv6: the address's halves, the value, nothing, in 64 each */
};

struct table {
	__u64 base;      /* an address's slot is (its upper 64 bits >> shift) - base; IPv4 has all its bits there */
	__u32 shift;
	__u32 slots;     /* 0: all addresses have one value, `below` and `above` */
	__u32 page;      /* of the first interval */
	__u32 below;     /* value of the addresses before the first slot, */
	__u32 above;     /* and of those after the last */
	__u32 layout;
	__u32 zero;
	__u32 pad;
};
_Static_assert(sizeof(struct table) == 40, "table");

struct failsafe_key {
	__u32 plen; /* of all that follows */
	__u32 ipv4; /* ::/0 does not cover IPv4 */
	struct address addr;
};
_Static_assert(sizeof(struct failsafe_key) == 24, "failsafe_key");

/* Who has sent a datagram to a worker's socket, from where egress policy would let none be sent to. */
struct peer_key {
	__u64 socket; /* cookie: never used twice while the machine is up */
	struct address addr;
	__u16 port;
	__u16 pad[3];
};
_Static_assert(sizeof(struct peer_key) == 32, "peer_key");

/*
 * Where the processes of a cgroup may connect to besides the name servers, whatever egress policy says. An entry with neither
 * address nor port says that they may go nowhere else.
 */
struct grant_key {
	__u64 cgroup; /* its id */
	struct address addr;
	__u16 port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct grant_key) == 32, "grant_key");

/* A listener of another program that is under the policy (gate_guard.c). The value says nothing. */
struct guarded_key {
	__u64 namespace; /* cookie of the network namespace: never used twice while the machine is up */
	struct address addr; /* 0.0.0.0 (mapped) or ::, any address of that family */
	__u16 port;
	__u8 pad[6];
};
_Static_assert(sizeof(struct guarded_key) == 32, "guarded_key");

/*
 * A ban shuts out one source: an exact address, or the prefix by which strikes are counted (IPv4 /32 and IPv6 /64, if nobody
 * says otherwise). It is found by one exact look-up for each length that bans have; the longest decides.
 */
struct ban_key {
	struct address prefix; /* zero beyond the length */
	__u32 length; /* bits of the IPv4-mapped form */
};
_Static_assert(sizeof(struct ban_key) == 20, "ban_key");

struct ban_mask {
	struct address mask;
	__u32 length; /* 0: no ban has it */
};

struct ban_masks {
	struct ban_mask masks[MAX_BAN_LENGTHS]; /* the longest first */
};
_Static_assert(sizeof(struct ban_masks) == 80, "ban_masks");

struct ban {
	__u64 expires; /* 0: never */
	__u64 created;
	__u64 hits; /* SYNs turned away; atomic */
	__u32 action;
	__u32 automatic; /* 1: made by a service; userspace keeps it from replacing an operator's */
	char reason[64];
};
_Static_assert(sizeof(struct ban) == 96, "ban");

struct limit {
	__u64 emission; /* 0: no limit */
	__u64 tolerance;
};
_Static_assert(sizeof(struct limit) == 16, "limit");

struct set_head {
	__u32 default_action;
	__u32 chain_items; /* how many there are of it, for userspace */
	struct limit per_source; /* per /32 or /64 */
	struct limit global;
	struct table tables[2]; /* IPv4, IPv6 */
	__u32 document_at; /* the description of the set, for userspace, in bytes from the first page */
	__u32 document_size;
	__u64 checksum; /* of pages, slots and chains, for userspace: whether somebody else has written there */
};
_Static_assert(sizeof(struct set_head) == 136, "set_head");

struct gate {
	__u64 revision;
	__u64 deadline; /* 0: none; from then on the set `fallback` is in force, because nobody confirmed `active` */
	__u32 active; /* which of the two sets is in force: read once per packet */
	__u32 fallback;
	__u32 flags;
	__u16 failsafe_ports[MAX_FAILSAFE_PORTS]; /* 0: none */
	__u16 source_lengths[2]; /* IPv4, IPv6: how many bits of an address stand for a source, to strikes and their bans */
	__u32 failsafe_list; /* which of the two lists of networks is in force */
	__u32 pad;
	__u64 owner; /* the instance, for userspace */
	struct lengths runtime[2]; /* IPv4, IPv6 */
	struct set_head sets[2];
	struct ban_masks bans[2]; /* IPv4, IPv6 */
	__u64 seal; /* for userspace: a checksum of all the others, by which it knows what somebody else has written */
};
_Static_assert(sizeof(struct gate) == 552, "gate");

/*
 * How many RST answer `reject`, of all sources and CPUs together. Addresses in a flood are forged: without a bound the host
 * would send each of them an answer that it never asked for. As many as the kernel's ICMP errors (net.ipv4.icmp_msgs_per_sec,
 * icmp_msgs_burst), and of the order of FreeBSD's RST (net.inet.icmp.icmplim); ten times what clients that are turned
 * away by mistake make.
 */
enum reject_rate { REJECTS_PER_SECOND = 1000, REJECT_BURST = 50 };

/* One for the host and not one for each CPU: beyond the rate it is only read, so the CPUs do not fight for it in a flood. */
struct reject_meter {
	struct limit limit;
	__u64 arrival;
};
_Static_assert(sizeof(struct reject_meter) == 24, "reject_meter");

/*
 * How XDP sends something back on an interface, if it may (see kernel/xdp.py). A veth wakes its peer for XDP_TX only if the
 * peer has an XDP program, too (veth_xdp_flush); for a redirect it is enough that the peer has NAPI (veth_xdp_xmit).
 */
enum answers { ANSWERS_NONE = 0, ANSWERS_TRANSMIT = 1, ANSWERS_REDIRECT = 2 };

/* An interface with gate_xdp. */
struct interface {
	__u8 hardware[6];
	__u16 answers;
};
_Static_assert(sizeof(struct interface) == 8, "interface");

/* Key of a token bucket: the rule (or BUCKET_SOURCE, BUCKET_GLOBAL) and the source's /32 or /64. */
struct bucket_key {
	__u32 rule;
	__u32 pad;
	__u8 source[8];
};

enum bucket { BUCKET_SOURCE = 0xfffffffe, BUCKET_GLOBAL = 0xffffffff };

struct rule_hits {
	__u64 decided;
	__u64 dry; /* would have decided, were it not a dry run */
};

/* What became of one source at one listener's port: for `why`, and for what a load would change. */
struct client_key {
	struct address source;
	__u16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct client_key) == 20, "client_key");

struct client {
	__u64 let_in; /* SYNs; atomic, as is `denied` */
	__u64 let_in_last;
	__u64 denied;
	__u64 denied_last;
	__u32 rule; /* of the last denial, as are the others */
	__u8 stage;
	__u8 action;
	__u8 hook;
	__u8 pad;
};
_Static_assert(sizeof(struct client) == 40, "client");

/*
 * How many denials are kept in struct client, for each CPU: in a flood the record is a sample, and what it has left out is
 * counted. Those who are let in are all kept: to accept them costs a hundred times as much.
 */
enum client_rate { DENIALS_PER_SECOND = 2000, DENIAL_BURST = 1000 };

/* A verdict that took effect, for those who watch. */
struct event {
	__u64 time;
	struct address source;
	__u32 rule;
	__u32 dry_rule;
	__u16 port; /* the listener's */
	__u8 hook;
	__u8 action;
	__u8 stage;
	__u8 dry_action;
	__u16 pad;
};
_Static_assert(sizeof(struct event) == 40, "event");

/* On each CPU: how its events keep to the rate, and how many did not fit into it or into the ring. */
struct event_meter {
	__u64 arrival;
	__u64 lost;
};
_Static_assert(sizeof(struct event_meter) == 16, "event_meter");

struct verdict {
	__u32 action;
	__u32 stage;
	__u32 rule;
	__u32 dry_action; /* what the highest dry-run rule above the decision would have decided */
	__u32 dry_rule;
};

/* What one layer says: its first rule that decides, and the first dry run above that. A rank of 0 is none. */
struct finding {
	__u32 rank, rule, action;
	__u32 dry_rank, dry_rule, dry_action;
};

/* One connection attempt. Addresses are IPv4-mapped where ipv4 is set. */
struct packet {
	struct address source;
	struct address target;
	__u16 port; /* of the target, host byte order */
	__u8 ipv4;
	__u8 syn; /* SYN without ACK */
	__u16 source_port; /* host byte order */
	__u16 network;     /* where the IP header begins in the frame, */
	__u16 transport;   /* and the TCP header, from there */
	__u16 pad;
};
_Static_assert(sizeof(struct packet) == 44, "packet");

/* What XDP sends back in place of a SYN. Host byte order. */
struct answer {
	__u32 sequence;
	__u32 acknowledgement;
	__u16 flags;
	__u16 mss; /* 0: no option */
	__u16 window;
	__u16 pad;
};

/* A bucket that an admitted SYN is charged to. */
struct due {
	__u64 emission; /* 0: none */
	__u32 bucket;
	__u32 pad;
};

/*
 * What the witness is asked and answers (witness.c). A batch is a head and up to MAX_QUESTIONS of them; each run answers the
 * next one in its place, so both have one size.
 */
enum testimony_bound { MAX_QUESTIONS = 64 };

struct testimony_head {
	__u32 next; /* question */
	__u32 pad[3];
};
_Static_assert(sizeof(struct testimony_head) == 16, "testimony_head");

struct question {
	struct address source, target; /* target: as in a listener_key */
	__u16 port;
	__u16 pad;
	__u32 nonce;
	__u32 unused;
};
_Static_assert(sizeof(struct question) == 44, "question");

enum testimony_listener { TESTIMONY_NO_LISTENER = 0, TESTIMONY_OPEN = 1, TESTIMONY_CLOSED = 2 };

struct testimony {
	__u32 nonce; /* the question's; another one if the witness was disturbed */
	__u32 listener;
	struct verdict verdict; /* rates as within their limit */
	__u32 loaded_rank, loaded_rule; /* what each layer says, whatever was decided before it was asked: 0 then */
	__u32 runtime_rank, runtime_rule;
};
_Static_assert(sizeof(struct testimony) == sizeof(struct question), "testimony");

enum tcp_size { TCP_WORDS = 15 }; /* of the largest header, of 32 bits */

/*
 * What the programs work on. It is kept in a map and not on the stack, because of memory in maps the verifier knows
 * nothing: what it knows of the stack it carries through every turn of a loop, along every path. The hooks run in
 * softirqs, one at a time on a CPU. (sk_lookup also runs for sock_diag queries, in a process; if packets come in
 * between, the query may get a wrong answer. And gate_xdp has it run once, knowingly.) The witness, which runs in processes,
 * has one of its own.
 */
enum scratch_index { SCRATCH_HOOKS = 0, SCRATCH_WITNESS = 1, SCRATCH_COUNT = 2 };

struct scratch {
	struct packet packet;
	__u32 wildcard; /* the listener takes any address */
	__u64 high, low; /* the source's IPv4-mapped form, in host byte order */
	struct finding loaded, runtime;
	__u64 word, next, last;
	struct runtime_key key;
	__u32 base;
	struct verdict verdict;
	struct due due[2];
	struct listener listener;
	struct answer answer;
	__u32 size; /* of the TCP header in `tcp`, bytes */
	__u32 tcp[TCP_WORDS]; /* as it came */
	struct ban_key ban; /* the one that decided */
};
_Static_assert(sizeof(struct scratch) == 328, "scratch");

#endif
