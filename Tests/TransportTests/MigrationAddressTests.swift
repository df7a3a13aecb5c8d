import Testing

@testable import Transport

@Suite struct MigrationAddressTests {
    @Test(
        "a migration URI is parsed, and given back",
        arguments: [
            ("tcp:127.0.0.1:4444", .tcp(host: "127.0.0.1", port: "4444")),
            ("tcp:[::1]:4444", .tcp(host: "::1", port: "4444")),
            ("tcp::0", .tcp(host: "", port: "0")),
            ("tcp:box.example:nfs-rdma", .tcp(host: "box.example", port: "nfs-rdma")),
            ("unix:/run/a:b,c", .unix(path: "/run/a:b,c")),
            ("fd:7", .descriptor("7")),
            ("fd:migration", .descriptor("migration")),
            ("exec:gzip -c > /x; true", .exec(arguments: ["/bin/sh", "-c", "gzip -c > /x; true"])),
            ("file:/tmp/a,b", .file(path: "/tmp/a,b", offset: 0)),
            ("file:/tmp/a,offset=65536", .file(path: "/tmp/a", offset: 65536)),
        ] as [(String, MigrationAddress)])
    func roundTrip(uri: String, address: MigrationAddress) throws {
        #expect(try MigrationAddress(uri) == address)
        #expect(address.description == uri)
    }

    @Test(
        "an offset takes the suffixes of sizes, and hexadecimal",
        arguments: [
            ("0", 0), ("17", 17), ("0x1000", 4096), ("0XfF", 255), ("4K", 4096), ("2m", 2 << 20), ("3G", 3 << 30),
            ("1T", 1 << 40), ("9B", 9), ("9223372036854775807", UInt64(Int64.max)),
        ] as [(String, UInt64)])
    func offsets(text: String, offset: UInt64) throws {
        #expect(try MigrationAddress("file:/f,offset=\(text)") == .file(path: "/f", offset: offset))
    }

    @Test(
        "a URI that cannot be used says why",
        arguments: [
            ("4444", .noScheme), ("", .noScheme), ("rdma:host:1", .unknownScheme("rdma")),
            ("TCP:a:1", .unknownScheme("TCP")), ("tcp:", .empty("port")), ("tcp:host", .empty("port")),
            ("tcp:host:", .empty("port")), ("tcp:[::1]", .empty("port")), ("tcp:[::1:44", .openBracket),
            ("tcp:::1:44", .bareColons), ("tcp:host:65536", .port("65536")), ("tcp:host:-1", .port("-1")),
            ("tcp:host:4 4", .port("4 4")), ("tcp:host:44x", .port("44x")), ("tcp:h:1,ipv4=on", .option(",ipv4=on")),
            ("unix:", .empty("path")), ("fd:", .empty("descriptor")), ("exec:  ", .empty("command")),
            ("file:", .empty("path")), ("file:,offset=1", .empty("path")), ("file:/f,offset=", .offset("")),
            ("file:/f,offset=K", .offset("K")), ("file:/f,offset=-1", .offset("-1")),
            ("file:/f,offset=+1", .offset("+1")), ("file:/f,offset=0x", .offset("0x")),
            ("file:/f,offset=0x1G", .offset("0x1G")), ("file:/f,offset=1.5G", .offset("1.5G")),
            ("file:/f,offset=16777216T", .offset("16777216T")),
            ("file:/f,offset=9223372036854775808", .offset("9223372036854775808")),
        ] as [(String, MigrationAddressError.Reason)])
    func refused(uri: String, reason: MigrationAddressError.Reason) {
        let error = #expect(throws: MigrationAddressError.self) { try MigrationAddress(uri) }
        #expect(error?.reason == reason)
        #expect(error?.description.hasPrefix("migration address \"\(uri)\": ") == true)
    }

    @Test("a zero byte, which no system call would see behind, is refused")
    func zeroByte() {
        let error = #expect(throws: MigrationAddressError.self) { try MigrationAddress("unix:/a\0b") }
        #expect(error?.reason == .zeroByte)
    }

    @Test("the sentence about an unknown scheme names the possible ones")
    func unknownScheme() {
        #expect(
            MigrationAddressError("rdma:h:1", .unknownScheme("rdma")).description
                == "migration address \"rdma:h:1\": the scheme \"rdma\" is not known; "
                + "the possible ones are tcp:, unix:, fd:, exec:, file:")
    }

    @Test("a program with arguments is written as a shell would take it")
    func quoting() {
        let address = MigrationAddress.exec(arguments: ["/usr/bin/ssh", "box", "it's here", ""])
        #expect(address.description == #"exec:/usr/bin/ssh box 'it'\''s here' ''"#)
    }
}
