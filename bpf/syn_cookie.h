/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * SYN cookies: the answer to a SYN holds all that is to be remembered of it, so that a flood fills no queue. The cookie is
 * the stack's own, made for the very socket that gate_lookup would steer the SYN to, and the ACK goes up to that socket,
 * where the stack checks it (RFC 4987, 3.6; tcp_v4_get_syncookie, cookie_v4_check). Written rules:
 *
 *  - Whether there is to be one is the stack's to say: net.ipv4.tcp_syncookies is 2, or it is 1 and the socket's queue of
 *    requests is full; and the queue of those to be accepted is not.
 *  - And only for a SYN that no connection has: one that is there, half open, or in TIME-WAIT is the stack's to deal with
 *    (RFC 9293, 3.10.7.4; RFC 6191), or the ACK would find it and not the listening socket.
 *  - The answer has an MSS and no other option. Window scaling, SACK and ECN the stack keeps in the timestamp that it offers,
 *    with an offset that it makes from a secret of its own: XDP cannot make it, so these connections have none of them.
 *  - Payload in a SYN is not acknowledged, and a cookie of TCP Fast Open not looked at, as the stack does under cookies: the
 *    peer sends the data again (RFC 7413, 3.1). FIN or RST beside SYN: left to the stack.
 *  - The window is ten segments, the most that a peer sends before it hears of the stack's own (RFC 6928).
 */
#ifndef RAMA_EBPF_SYN_COOKIE_H
#define RAMA_EBPF_SYN_COOKIE_H

#define INITIAL_SEGMENTS 10

/* Copy the TCP header to where its length is not the frame's: a helper takes no packet that may end before its longest. */
static __always_inline int copy_tcp(struct xdp_md *ctx, struct scratch *s)
{
	void *end = (void *)(long)ctx->data_end;
	struct tcphdr *tcp = (void *)(long)ctx->data + known(s->packet.network, NETWORK_MASK) +
			     known(s->packet.transport, TRANSPORT_MASK);
	u32 *word = (u32 *)tcp;

	if ((void *)(tcp + 1) > end)
		return 0;
	s->size = tcp->doff * 4;
#pragma clang loop unroll(disable)
	for (int i = 0; i < TCP_WORDS; i++) {
		barrier();
		if (i * 4 >= s->size)
			break;
		if ((void *)(word + 1) > end)
			return 0;
		s->tcp[i] = *word++;
	}
	return 1;
}

/* The stack's cookie for the SYN, with the MSS that it holds in the upper half, or something negative. */
static __always_inline s64 make_cookie(struct xdp_md *ctx, struct scratch *s)
{
	struct bpf_sock *sk __attribute__((cleanup(release))) = NULL;
	struct ipv6hdr *ip;
	u64 size; /* 64 bits: widened after the comparisons it would be another value */
	u32 slot;

	if (!s->listener.sockets || !copy_tcp(ctx, s))
		return -1;
	slot = socket_slot(&s->listener, &s->packet);
	sk = (void *)sockets.lookup(&slot);
	if (!sk)
		return -1;
	ip = (void *)(long)ctx->data + known(s->packet.network, NETWORK_MASK);
	if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
		return -1;
	size = s->size;
	HOLD(size);
	if (size < sizeof(struct tcphdr))
		return -1;
	HOLD(size); /* one comparison of a difference would tell the verifier nothing */
	if (size > sizeof(s->tcp))
		return -1;
	/* Of IPv4, too, so many bytes are there, and of them it reads the addresses only. */
	return bpf_tcp_gen_syncookie(sk, ip, sizeof(*ip), (void *)s->tcp, size);
}

/*
 * Whether there is a connection, of any state, between the SYN's ends. If there is none, the look-up goes on to our listener
 * and runs gate_lookup, which works in the same scratch: it judges the same SYN, and what it says nothing of is kept here.
 */
static __always_inline int has_connection(struct xdp_md *ctx, struct scratch *s)
{
	const struct packet *p = &s->packet;
	u32 network = p->network, transport = p->transport, size;
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int found = 0;

	if (p->ipv4) {
		tuple.ipv4.saddr = mapped_ipv4(&p->source);
		tuple.ipv4.daddr = mapped_ipv4(&p->target);
		tuple.ipv4.sport = bpf_htons(p->source_port);
		tuple.ipv4.dport = bpf_htons(p->port);
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &p->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &p->target, 16);
		tuple.ipv6.sport = bpf_htons(p->source_port);
		tuple.ipv6.dport = bpf_htons(p->port);
		size = sizeof(tuple.ipv6);
	}
	sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		found = sk->state != TCP_LISTEN_STATE;
		bpf_sk_release(sk);
	}
	barrier();
	s->packet.network = network;
	s->packet.transport = transport;
	return found;
}

/* Answer a SYN that is let in, if the stack would do so with a cookie, and charge it to its limits: it goes no further. */
static __always_inline int answer_with_cookie(struct xdp_md *ctx, struct scratch *s)
{
	struct syn_facts facts = {};
	struct verdict v;
	s64 cookie;
	u32 mtu = 0;
	int answer;

	if (!read_syn(ctx, &s->packet, &facts))
		return XDP_PASS;
	s->answer.acknowledgement = facts.sequence + 1;
	s->answer.flags = TCP_SYN | TCP_ACK;
	bpf_check_mtu(ctx, 0, &mtu, 0, 0); /* of the interface, whatever it says of the frame */
	mtu -= (s->packet.ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + sizeof(struct tcphdr);
	if (mtu > 0xffff)
		return XDP_PASS; /* less than headers, or nothing that an MSS can say */
	s->answer.mss = mtu;
	s->answer.window = mtu * INITIAL_SEGMENTS < 0xffff ? mtu * INITIAL_SEGMENTS : 0xffff;
	cookie = make_cookie(ctx, s);
	if (cookie < 0)
		return XDP_PASS;
	/* Last, because it costs most. (The socket has noted a cookie that is not sent; it will refuse none for that.) */
	if (has_connection(ctx, s))
		return XDP_PASS;
	s->answer.sequence = cookie;
	answer = send_back(ctx, s);
	if (answer != XDP_PASS) {
		settle(s);
		v = s->verdict;
		count(&v, s, HOOK_XDP);
	}
	return answer;
}

#endif
