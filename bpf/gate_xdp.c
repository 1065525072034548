/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * XDP on an interface, opt-in: drops the SYN of a denied source before the stack allocates anything for it. Up to two
 * VLAN tags (802.1Q, 802.1ad) are stepped over. Everything that is not a SYN for one of our listeners passes
 * untouched, and so does a `reject`: its RST comes from sk_lookup.
 */

struct vlan_header {
	__be16 tci;
	__be16 inner;
};

int gate_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct packet p = {};
	struct listener *listener;
	struct verdict v;
	__be16 protocol;
	void *at = eth + 1;
	int kind;

	if (at > end)
		return XDP_PASS;
	protocol = eth->h_proto;
#pragma unroll
	for (int i = 0; i < 2; i++) {
		struct vlan_header *tag = at;

		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if ((void *)(tag + 1) > end)
			return XDP_PASS;
		protocol = tag->inner;
		at = tag + 1;
	}
	if (protocol == bpf_htons(ETH_P_IP))
		kind = parse_ipv4(at, end, &p);
	else if (protocol == bpf_htons(ETH_P_IPV6))
		kind = parse_ipv6(at, end, &p);
	else
		return XDP_PASS;
	/* What cannot be followed here is left to the stack, and then to gate_cgroup, which lets none of it in. */
	if (kind != PACKET_TCP || !p.syn)
		return XDP_PASS;
	listener = find_listener(&p);
	if (!listener)
		return XDP_PASS;

	v = verdict(&p, listener, 0);
	if (v.action != ACTION_DROP)
		return XDP_PASS; /* gate_cgroup judges it again, charges its limits and counts it */
	count(&v, HOOK_XDP);
	return XDP_DROP;
}
