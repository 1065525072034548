/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * sk_lookup in the listeners' network namespace: steers a SYN to one of the listener's sockets, and answers RST for
 * `reject`, up to a rate. A silent drop is left to gate_cgroup, which comes next, and so is a `reject` beyond that rate.
 * Traffic that is not for our listeners goes on as if this program were not there.
 */

int gate_lookup(struct bpf_sk_lookup *ctx)
{
	struct scratch *s;
	struct packet *p;
	const struct listener *listener;
	struct verdict v;
	u32 slot;
	int ipv4;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	s = begin();
	if (!s)
		return SK_PASS;
	p = &s->packet;
	p->port = ctx->local_port;
	p->source_port = bpf_ntohs((u16)ctx->remote_port);
	p->syn = 1;
	ipv4 = ctx->family == AF_INET;
	CONTEXT_ADDRESS(&p->source, ipv4, ctx->remote_ip4, ctx->remote_ip6);
	CONTEXT_ADDRESS(&p->target, ipv4, ctx->local_ip4, ctx->local_ip6);
	p->ipv4 = is_mapped(&p->source);
	if (!find_listener(p, &s->listener, &s->wildcard))
		return SK_PASS;
	listener = &s->listener;
	barrier();

	if (listener->state == LISTENER_OPEN) { /* else gate_cgroup drops the SYN, and judges an ACK */
		v = verdict(s, CHARGE_NONE);
		if (v.action == ACTION_REJECT && may_reset()) {
			count(&v, s, HOOK_LOOKUP);
			return SK_DROP; /* no socket: the stack answers RST */
		}
	}
	if (!listener->sockets)
		return SK_DROP; /* ours, but nobody serves it: it must not leak to another socket */

	slot = socket_slot(listener, p);
	{
		struct bpf_sock *sk __attribute__((cleanup(release))) = (void *)sockets.lookup(&slot);

		if (!sk)
			return SK_DROP;
		/* NO_REUSEPORT: this very socket, and not what the hash of its REUSEPORT group would choose in its place.
		 * Fails only if the socket's family or protocol does not fit, which the loader rules out. */
		return bpf_sk_assign((void *)ctx, (void *)sk, BPF_SK_LOOKUP_F_NO_REUSEPORT) ? SK_DROP : SK_PASS;
	}
}
