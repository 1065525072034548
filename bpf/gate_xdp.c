/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * XDP on an interface, opt-in: drops the SYN of a denied source before the stack allocates anything for it, and answers
 * RST for `reject`, up to a rate. With SYN_COOKIES it also answers a SYN that is let in with a cookie, where the stack
 * would do so itself. Everything that is not a SYN for one of our listeners passes untouched.
 */

/*
 * Whether a packet that matches a listener on any address, or on a prefix, is for another host. On a host that forwards, that host's
 * port of the same number is none of our business; the routing table knows, so no list of local addresses is kept.
 */
static __always_inline int is_transit(struct xdp_md *ctx, const struct packet *p, int ipv4)
{
	struct bpf_fib_lookup route = { .ifindex = ctx->ingress_ifindex, .l4_protocol = IPPROTO_TCP };

	if (ipv4) {
		route.family = AF_INET;
		route.ipv4_src = mapped_ipv4(&p->source);
		route.ipv4_dst = mapped_ipv4(&p->target);
	} else {
		route.family = AF_INET6;
		__builtin_memcpy(route.ipv6_src, &p->source, 16);
		__builtin_memcpy(route.ipv6_dst, &p->target, 16);
	}
	/* SUCCESS and NO_NEIGH: a route to another host. An interface that does not forward answers FWD_DISABLED. */
	switch (bpf_fib_lookup(ctx, &route, sizeof(route), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_UNSUPP_LWT:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return 1;
	}
	return 0;
}

/*
 * Whether the frame was sent to this interface, and not to something that is reached through it with a hardware address
 * of its own: the other ports of a bridge, a macvlan in some container.
 */
static __always_inline int is_for_interface(struct xdp_md *ctx, const struct interface *interface)
{
	const u16 *own = (const void *)interface->hardware, *target;
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0;
	target = (void *)eth->h_dest;
	return own[0] == target[0] && own[1] == target[1] && own[2] == target[2];
}

/* RST for a SYN that no connection is made for: RFC 9293, 3.10.7.1. */
static __always_inline int reset(struct xdp_md *ctx, struct scratch *s)
{
	struct syn_facts facts = {};
	struct verdict v;
	int answer;

	if (!read_syn(ctx, &s->packet, &facts))
		return XDP_PASS; /* to sk_lookup, which answers at the same rate */
	if (facts.rst || !may_reset()) { /* nothing answers an RST */
		answer = XDP_DROP;
		count_silent();
	} else {
		s->answer.sequence = 0;
		s->answer.acknowledgement = facts.sequence + 1 + facts.fin + facts.payload;
		s->answer.flags = TCP_RST | TCP_ACK;
		s->answer.mss = 0;
		s->answer.window = 0;
		answer = send_back(ctx, s);
	}
	if (answer != XDP_PASS) {
		v = s->verdict;
		count(&v, s, HOOK_XDP);
	}
	return answer;
}

#ifdef SYN_COOKIES
#include "syn_cookie.h"
#endif

int gate_xdp(struct xdp_md *ctx)
{
	struct scratch *s = begin();
	struct interface *interface;
	struct verdict v;
	u32 index;
	int own, answer;

	if (!s)
		return XDP_PASS;
	/* What cannot be followed here is left to the stack, and then to gate_cgroup, which lets none of it in. */
	if (parse_frame((void *)(long)ctx->data, (void *)(long)ctx->data_end, &s->packet) != PACKET_TCP || !s->packet.syn)
		return XDP_PASS;
	if (!find_listener(&s->packet, &s->listener, &s->wildcard) || s->listener.state != LISTENER_OPEN)
		return XDP_PASS; /* if closed, to gate_cgroup */
	v = verdict(s, CHARGE_PEEK);
#ifndef SYN_COOKIES
	if (v.action == ACTION_ALLOW)
		return XDP_PASS; /* gate_cgroup judges it again, charges its limits and counts it */
#endif
	index = ctx->ingress_ifindex;
	interface = interfaces.lookup(&index);
	if (!interface)
		return XDP_PASS; /* it went to another network namespace, and its listeners are not ours */
	own = is_for_interface(ctx, interface);
	if (s->wildcard && (!own || is_transit(ctx, &s->packet, is_mapped(&s->packet.target))))
		return XDP_PASS;
	if (v.action == ACTION_DROP) {
		count(&v, s, HOOK_XDP);
		return XDP_DROP;
	}
	if (!own || interface->answers == ANSWERS_NONE)
		return XDP_PASS;
#ifdef SYN_COOKIES
	answer = v.action == ACTION_REJECT ? reset(ctx, s) : answer_with_cookie(ctx, s);
#else
	answer = reset(ctx, s);
#endif
	return answer == XDP_TX && interface->answers == ANSWERS_REDIRECT ? bpf_redirect(index, 0) : answer;
}
