/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Every structure and constant that the kernel programs share with userspace. rama_ebpf/kernel/abi.py reads the
 * enumerations from this very file and mirrors the structures, whose sizes are asserted here.
 *
 * Addresses are in network byte order, everything else in host byte order. Times are CLOCK_BOOTTIME nanoseconds.
 */
#ifndef RAMA_EBPF_POLICY_H
#define RAMA_EBPF_POLICY_H

/* Changes whenever a map's meaning does: pins with another number are not reused. */
enum layout { LAYOUT_VERSION = 1 };

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

enum rule_flag { RULE_DRY_RUN = 1 };

/* Which parts of a set hold anything: a look-up that can find nothing is not made. */
enum set_flag {
	SET_EXACT4  = 1,
	SET_EXACT6  = 2,
	SET_PREFIX4 = 4,
	SET_PREFIX6 = 8,
};

enum gate_flag {
	GATE_BANS     = 1,
	GATE_FAILSAFE = 2,
	GATE_TIMED    = 4, /* some rule or ban expires */
};

enum bound {
	MAX_CANDIDATES    = 3,  /* rules that one prefix can hold for the case that earlier ones expire or are dry */
	MAX_LISTENERS     = 64,
	SOCKETS_PER_LISTENER = 64,
	SCOPE_ANY         = 0,  /* rules without a port; otherwise the scope is the port itself */
	SCOPE_BITS        = 16,
	MAX_STEPS         = 16, /* prefixes of one address that may be passed over because they are dry or expired */
	ACTION_COUNT      = 5,
	STAGE_COUNT       = 7,
};

/* An IPv4 address is kept as IPv4-mapped where both families share a map. */
struct address {
	__u8 b[16];
};

struct listener_key {
	struct address addr; /* 0.0.0.0 (mapped) or ::, any address of that family */
	__u16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct listener_key) == 20, "listener_key");

struct listener {
	__u16 id;      /* < MAX_LISTENERS */
	__u16 sockets; /* how many slots of the SOCKMAP, from id * SOCKETS_PER_LISTENER, are filled */
	__u16 scoped;  /* whether some rule names this port */
	__u16 failsafe;
};
_Static_assert(sizeof(struct listener) == 8, "listener");

struct rule {
	__u32 action;
	__u32 flags;
	__u64 expires; /* 0: never */
	__u64 emission; /* limit: nanoseconds between two admitted SYNs at the sustained rate */
	__u64 tolerance; /* limit: emission * (burst - 1) */
};
_Static_assert(sizeof(struct rule) == 32, "rule");

/* What a prefix (or an exact address) of a set holds: rule ids in order of precedence, 0 ends the list. */
struct entry {
	__u32 rule[MAX_CANDIDATES];
	__u32 plen; /* bits of the address, without the scope's */
};
_Static_assert(sizeof(struct entry) == 16, "entry");

/* Keys of the sets' maps. The IPv4 forms are the first bytes of the IPv6 forms, so that one piece of code serves both. */
struct exact_key {
	__u16 scope;
	__u16 pad;
	__u8 addr[16]; /* IPv4: the first 4 */
};
_Static_assert(sizeof(struct exact_key) == 20, "exact_key");

struct prefix_key {
	__u32 plen; /* with SCOPE_BITS */
	__u16 scope;
	__u8 addr[16]; /* IPv4: the first 4 */
} __attribute__((packed));
_Static_assert(sizeof(struct prefix_key) == 22, "prefix_key");

struct failsafe_key {
	__u32 plen; /* of the IPv4-mapped form */
	struct address addr;
};
_Static_assert(sizeof(struct failsafe_key) == 20, "failsafe_key");

struct ban {
	__u64 expires; /* 0: never */
	__u64 created;
	__u64 hits; /* SYNs turned away; atomic */
	__u32 action;
	__u32 pad;
	char reason[64];
};
_Static_assert(sizeof(struct ban) == 96, "ban");

struct limit {
	__u64 emission; /* 0: no limit */
	__u64 tolerance;
};

struct set_head {
	__u32 default_action;
	__u32 flags;
	struct limit per_source; /* per /32 or /64 */
	struct limit global;
};
_Static_assert(sizeof(struct set_head) == 40, "set_head");

struct gate {
	__u64 revision;
	__u32 active; /* which of the two sets is in force: read once per packet */
	__u32 flags;
	struct set_head sets[2];
};
_Static_assert(sizeof(struct gate) == 96, "gate");

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

#endif
