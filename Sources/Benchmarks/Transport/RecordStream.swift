import Glibc
import Host

/// What TLS channels are held against: SSL_write and SSL_read of 16 KiB, from and to one buffer each, on blocking sockets.
///
/// It shares no code with `Transport/TLS`: the same library, TLS 1.3 and the same cipher suite, with a pre-shared key.
enum RecordStream {
    private static let recordBytes = 16 << 10

    static func measure(byteCount: Int) throws -> StreamRate {
        let library = try Library()
        let (outSocket, intoSocket) = try LoopbackPair.connect()
        let accepting = try Background { try Connection(library, intoSocket, isServer: true) }
        let out = try Connection(library, outSocket, isServer: false)
        let into = try accepting.value()
        let records = byteCount / recordBytes
        return try StreamRate.measuring(records * recordBytes) {
            let sender = try Background { try out.send(records) }
            try into.receive(records)
            try sender.value()
        }
    }

    struct Failure: Error, CustomStringConvertible {
        let description: String
    }

    /// The few functions it takes.
    @safe private final class Library: @unchecked Sendable {
        typealias Object = OpaquePointer?
        typealias ServerKey =
            @convention(c) (Object, UnsafePointer<CChar>?, UnsafeMutablePointer<UInt8>?, UInt32) -> UInt32
        typealias ClientKey =
            @convention(c) (
                Object, UnsafePointer<CChar>?, UnsafeMutablePointer<CChar>?, UInt32, UnsafeMutablePointer<UInt8>?,
                UInt32
            ) -> UInt32

        // SAFETY: the types of OpenSSL's headers; the library stays loaded.
        let method: @convention(c) () -> Object
        let newContext: @convention(c) (Object) -> Object
        let freeContext: @convention(c) (Object) -> Void
        let setSuites: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
        let setServerKey: @convention(c) (Object, ServerKey) -> Void
        let setClientKey: @convention(c) (Object, ClientKey) -> Void
        let new: @convention(c) (Object) -> Object
        let free: @convention(c) (Object) -> Void
        let setDescriptor: @convention(c) (Object, Int32) -> Int32
        let accept: @convention(c) (Object) -> Int32
        let connect: @convention(c) (Object) -> Int32
        let read: @convention(c) (Object, UnsafeMutableRawPointer, Int32) -> Int32
        let write: @convention(c) (Object, UnsafeRawPointer, Int32) -> Int32

        init() throws(DynamicLibraryError) {
            let library = try DynamicLibrary(["libssl.so.3"], remedy: "install OpenSSL 3 (apt install libssl3)")
            unsafe method = try library.function("TLS_method", as: (@convention(c) () -> Object).self)
            unsafe newContext = try library.function("SSL_CTX_new", as: (@convention(c) (Object) -> Object).self)
            unsafe freeContext = try library.function("SSL_CTX_free", as: (@convention(c) (Object) -> Void).self)
            unsafe setSuites = try library.function(
                "SSL_CTX_set_ciphersuites", as: (@convention(c) (Object, UnsafePointer<CChar>) -> Int32).self)
            unsafe setServerKey = try library.function(
                "SSL_CTX_set_psk_server_callback", as: (@convention(c) (Object, ServerKey) -> Void).self)
            unsafe setClientKey = try library.function(
                "SSL_CTX_set_psk_client_callback", as: (@convention(c) (Object, ClientKey) -> Void).self)
            unsafe new = try library.function("SSL_new", as: (@convention(c) (Object) -> Object).self)
            unsafe free = try library.function("SSL_free", as: (@convention(c) (Object) -> Void).self)
            unsafe setDescriptor = try library.function(
                "SSL_set_fd", as: (@convention(c) (Object, Int32) -> Int32).self)
            unsafe accept = try library.function("SSL_accept", as: (@convention(c) (Object) -> Int32).self)
            unsafe connect = try library.function("SSL_connect", as: (@convention(c) (Object) -> Int32).self)
            unsafe read = try library.function(
                "SSL_read", as: (@convention(c) (Object, UnsafeMutableRawPointer, Int32) -> Int32).self)
            unsafe write = try library.function(
                "SSL_write", as: (@convention(c) (Object, UnsafeRawPointer, Int32) -> Int32).self)
        }
    }

    /// One end, used by one thread at a time.
    @safe private final class Connection: @unchecked Sendable {
        private let library: Library
        private let socket: Descriptor
        // SAFETY: objects of OpenSSL, freed once.
        private let context: OpaquePointer
        private let connection: OpaquePointer

        init(_ library: Library, _ socket: Descriptor, isServer: Bool) throws {
            guard let context = unsafe library.newContext(library.method()) else {
                throw Failure(description: "no memory")
            }
            _ = unsafe library.setSuites(context, "TLS_AES_128_GCM_SHA256")
            unsafe library.setServerKey(context) { _, _, key, room in
                guard room >= 32, let key = unsafe key else { return 0 }
                unsafe key.initialize(repeating: 0x42, count: 32)
                return 32
            }
            unsafe library.setClientKey(context) { _, _, identity, _, key, room in
                guard room >= 32, let key = unsafe key, let identity = unsafe identity else { return 0 }
                unsafe identity[0] = CChar(UInt8(ascii: "a"))
                unsafe identity[1] = 0
                unsafe key.initialize(repeating: 0x42, count: 32)
                return 32
            }
            guard let connection = unsafe library.new(context) else { throw Failure(description: "no memory") }
            _ = unsafe library.setDescriptor(connection, socket.number)
            self.library = library
            self.socket = socket
            unsafe self.context = unsafe context
            unsafe self.connection = unsafe connection
            let result = unsafe isServer ? library.accept(connection) : library.connect(connection)
            guard result == 1 else { throw Failure(description: "openssl: the handshake over loopback failed") }
        }

        deinit {
            unsafe library.free(connection)
            unsafe library.freeContext(context)
        }

        func send(_ records: Int) throws {
            let buffer = try Mapping(anonymousByteCount: recordBytes)
            for number in 0..<recordBytes / 8 { buffer.store(UInt64(number) &* 0x9E37_79B9_7F4A_7C15, at: number * 8) }
            for _ in 0..<records {
                let count = unsafe buffer.withBytes(at: 0, count: recordBytes) {
                    unsafe library.write(connection, $0.baseAddress!, Int32(recordBytes))
                }
                guard count == Int32(recordBytes) else { throw Failure(description: "openssl: SSL_write failed") }
            }
        }

        func receive(_ records: Int) throws {
            let buffer = try Mapping(anonymousByteCount: recordBytes)
            var left = records * recordBytes
            while left > 0 {
                let count = unsafe buffer.withMutableBytes(at: 0, count: recordBytes) {
                    unsafe library.read(connection, $0.baseAddress!, Int32(recordBytes))
                }
                guard count > 0 else { throw Failure(description: "openssl: SSL_read failed") }
                left -= Int(count)
            }
        }
    }
}
