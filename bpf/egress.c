/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * connect4 and connect6 on the workers' cgroup: the backstop of the egress policy. The services check the address that
 * they dial and say no in their protocol's words; this refuses (EPERM) what was dialled in any other way. Its meaning is
 * that of rama_ebpf/policy/egress.py: the longest prefix decides, and an address that embeds an IPv4 address is judged as
 * both.
 *
 * Only streams are judged: a datagram socket is connected for DNS, and answers clients wherever they are.
 */

#define SOCK_STREAM_TYPE 1
#define CONNECT_REFUSE 0
#define CONNECT_ALLOW 1
#define DNS_PORT 53

static __always_inline int is_refused(const struct address *target, u16 port)
{
	struct failsafe_key key = { .plen = 32 + 128, .ipv4 = is_mapped(target), .addr = *target };
	u32 *found = egress.lookup(&key);

	if (!found || !(*found & EGRESS_DENY))
		return 0;
	return !(*found & EGRESS_NAMESERVER && port == DNS_PORT);
}

static __always_inline int judge_connect(const struct address *target, u16 port)
{
	struct address inner;
	u32 ip;

	if (is_refused(target, port))
		return CONNECT_REFUSE;
	if (target->half[0] == bpf_htonll(0x0064ff9b00000000ull) && !*(u32 *)(target->b + 8))
		__builtin_memcpy(&ip, target->b + 12, 4); /* NAT64, RFC 6052 */
	else if (target->b[0] == 0x20 && target->b[1] == 0x02)
		__builtin_memcpy(&ip, target->b + 2, 4); /* 6to4, RFC 3056 */
	else
		return CONNECT_ALLOW;
	map_ipv4(&inner, ip);
	return is_refused(&inner, port) ? CONNECT_REFUSE : CONNECT_ALLOW;
}

int egress_connect4(struct bpf_sock_addr *ctx)
{
	struct address target;

	if (ctx->type != SOCK_STREAM_TYPE)
		return CONNECT_ALLOW;
	map_ipv4(&target, ctx->user_ip4);
	return judge_connect(&target, bpf_ntohs(ctx->user_port));
}

int egress_connect6(struct bpf_sock_addr *ctx)
{
	u32 words[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	struct address target;

	if (ctx->type != SOCK_STREAM_TYPE)
		return CONNECT_ALLOW;
	__builtin_memcpy(&target, words, 16);
	return judge_connect(&target, bpf_ntohs(ctx->user_port));
}
