/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * cgroup_skb ingress on the proxy's cgroup: the silent drop. It runs when a segment has found its socket, so it sees
 * nothing but the proxy's own sockets, and for everything that is not addressed to a listening socket it returns
 * after three comparisons.
 */

#define CGROUP_PASS 1
#define CGROUP_DROP 0
#define TCP_LISTEN_STATE 10 /* BPF_TCP_LISTEN */

int gate_cgroup(struct __sk_buff *skb)
{
	struct scratch *s;
	struct packet *p;
	struct bpf_sock *sk = skb->sk;
	struct verdict v = {};
	void *data, *end;
	int kind;

	if (!sk)
		return CGROUP_PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->state != TCP_LISTEN_STATE || sk->protocol != IPPROTO_TCP)
		return CGROUP_PASS;

	s = begin();
	if (!s)
		return CGROUP_DROP;
	p = &s->packet;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	kind = skb->protocol == bpf_htons(ETH_P_IP) ? parse_ipv4(data, end, p) : parse_ipv6(data, end, p);
	if (kind != PACKET_TCP) {
		/* The stack took it for TCP and found one of our listeners. What we cannot judge does not get in. */
		v.stage = STAGE_PARSE;
		v.action = ACTION_DROP;
		count(&v, s, HOOK_CGROUP);
		return CGROUP_DROP;
	}
	if (!find_listener(p, &s->listener, &s->wildcard))
		return CGROUP_PASS; /* a listening socket that the proxy did not put under the gate */
	if (s->listener.state == LISTENER_HOME || (p->syn && s->listener.state != LISTENER_OPEN))
		return CGROUP_DROP; /* not counted: nobody has judged it, and the client tries again */

	/* The ACK that ends a handshake is judged as well: a source that is blocked after its SYN stays out. */
	barrier(); /* read again, it is unknown to the verifier, which else walks the verdict once for each of the two */
	v = verdict(s, p->syn * CHARGE_ADMIT); /* or CHARGE_NONE, which is 0 */
	if (p->syn) {
		count(&v, s, HOOK_CGROUP);
		if (v.action == ACTION_REJECT) /* gate_lookup let it come here because it may not answer */
			count_silent();
	}
	return v.action == ACTION_ALLOW ? CGROUP_PASS : CGROUP_DROP;
}
