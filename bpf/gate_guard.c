/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * cgroup_skb ingress on the root cgroup: puts listeners of other programs (sshd, nginx) under the policy. It runs for each
 * packet of the whole host that found a socket, so it looks at the socket's state first: what is not for a listener goes on
 * after three comparisons. Then it looks at what was registered by network namespace, address and port: the root cgroup
 * sees all namespaces, and port 22 of a container is not that of the host.
 *
 * A unit of its own that BCC compiles; the loader defines PIN_DIR and, from the running kernel's BTF, the OFFSET_ constants.
 */
#include <linux/types.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define AF_INET 2
#define AF_INET6 10

#include "policy.h"
#include "maps.h"
#include "packet.h"
#include "lookup.h"
#include "rates.h"
#include "verdict.h"
#include "account.h"

/* Not pinned beside the others: it ends with the guard's process. */
BPF_TABLE_PINNED("hash", struct guarded_key, u32, guarded, 1, PIN_DIR "/guarded");

#define CGROUP_PASS 1
#define CGROUP_DROP 0
#define TCP_LISTEN_STATE 10 /* BPF_TCP_LISTEN */

/* A member of a kernel structure, by its offset from BTF. */
#define MEMBER(type, pointer, offset) (*(type *)((void *)(pointer) + (offset)))

/* As find_listener: the address, then the wildcard of its family. */
static __always_inline int is_guarded(const struct packet *p, u64 namespace)
{
	struct guarded_key key = { .namespace = namespace, .addr = p->target, .port = p->port };

	if (guarded.lookup(&key))
		return 1;
	if (is_mapped(&p->target))
		map_ipv4(&key.addr, 0);
	else
		__builtin_memset(&key.addr, 0, sizeof(key.addr));
	return guarded.lookup(&key) != 0;
}

int gate_guard(struct __sk_buff *skb)
{
	struct scratch *s;
	struct packet *p;
	struct bpf_sock *sk = skb->sk;
	struct verdict v = {};
	struct tcp_sock *tp;
	void *data, *end, *net;
	u32 port;
	int kind;

	if (!sk)
		return CGROUP_PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->state != TCP_LISTEN_STATE || sk->protocol != IPPROTO_TCP)
		return CGROUP_PASS;
	port = sk->src_port;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return CGROUP_PASS; /* cannot be: it is TCP, and whole */
	net = MEMBER(void *, tp, OFFSET_SKC_NET);

	s = begin();
	if (!s)
		return CGROUP_PASS; /* cannot be: an array has all its elements */
	p = &s->packet;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	kind = skb->protocol == bpf_htons(ETH_P_IP) ? parse_ipv4(data, end, p) : parse_ipv6(data, end, p);
	p->port = port; /* what cannot be read to its end has none */
	if (!is_guarded(p, MEMBER(u64, net, OFFSET_NET_COOKIE)))
		return CGROUP_PASS;
	if (kind != PACKET_TCP) {
		/* The stack took it for TCP and found a listener. What we cannot judge does not get in. */
		v.stage = STAGE_PARSE;
		v.action = ACTION_DROP;
		count(&v, s, HOOK_CGROUP);
		return CGROUP_DROP;
	}
	/* The ACK that ends a handshake is judged as well: a source that is blocked after its SYN stays out. */
	barrier();
	v = verdict(s, p->syn * CHARGE_ADMIT); /* or CHARGE_NONE, which is 0 */
	if (p->syn) {
		count(&v, s, HOOK_CGROUP);
		if (v.action == ACTION_REJECT) /* nobody answers it here: silence */
			count_silent();
	}
	return v.action == ACTION_ALLOW ? CGROUP_PASS : CGROUP_DROP;
}
