import Host

/// The system's OpenSSL 3, opened when TLS is used for the first time: the build needs none of it.
///
/// The fields are named after the functions they are (`SSL_do_handshake` is `ssl.doHandshake`), and have the types of OpenSSL's
/// headers; objects of the library are opaque pointers. `nil` pointers mean what the manual pages say of NULL.
enum OpenSSL {
    typealias Object = OpaquePointer?

    /// Both libraries, or the sentence why there are none. Opened once.
    static let shared: Result<(ssl: LibSSL, crypto: LibCrypto), DynamicLibraryError> = {
        do throws(DynamicLibraryError) {
            return .success((try LibSSL(), try LibCrypto()))
        } catch { return .failure(error) }
    }()

    static let remedy = "TLS needs OpenSSL 3 (Debian and Ubuntu: apt install libssl3, Fedora: dnf install openssl-libs)"

    // Constants of the headers, with the macros' meaning.
    static let versionTLS13 = 0x0304
    static let modes = 0x1 | 0x2  // ENABLE_PARTIAL_WRITE, ACCEPT_MOVING_WRITE_BUFFER
    static let controlMode: Int32 = 33
    static let controlReadAhead: Int32 = 41
    static let controlSessionCache: Int32 = 44
    static let controlServerName: Int32 = 55
    static let controlMinimumVersion: Int32 = 123
    static let filePEM: Int32 = 1
    static let verifyPeer: Int32 = 1
    static let failIfNoPeerCertificate: Int32 = 2
    static let checkRevocation: UInt = 0x4
    static let noPartialWildcards: UInt32 = 4
    /// RFC 2253's form of a name; without `nameReversed` in the order of the certificate.
    static let nameFlags: UInt = 0x1 | 0x2 | 0x10 | 0x100 | 0x200 | (1 << 16) | (1 << 20) | (1 << 24)
    static let nameReversed: UInt = 1 << 20

    enum ErrorCode {
        static let ssl: Int32 = 1
        static let wantRead: Int32 = 2
        static let wantWrite: Int32 = 3
        static let systemCall: Int32 = 5
        static let closed: Int32 = 6
    }
}

/// The functions of libssl that are used.
@safe final class LibSSL: @unchecked Sendable {
    typealias Object = OpaquePointer?
    typealias VerifyCallback = @convention(c) (Int32, Object) -> Int32
    typealias FindSessionCallback =
        @convention(c) (Object, UnsafePointer<UInt8>?, Int, UnsafeMutablePointer<Object>?) -> Int32
    typealias UseSessionCallback =
        @convention(c) (
            Object, Object, UnsafeMutablePointer<UnsafePointer<UInt8>?>?, UnsafeMutablePointer<Int>?,
            UnsafeMutablePointer<Object>?
        ) -> Int32
    typealias PasswordCallback =
        @convention(c) (UnsafeMutablePointer<CChar>?, Int32, Int32, UnsafeMutableRawPointer?) -> Int32

    // SAFETY: code of a library that stays loaded; nothing here changes after `init`.
    let clientMethod: @convention(c) () -> Object
    let serverMethod: @convention(c) () -> Object
    let newContext: @convention(c) (Object) -> Object
    let freeContext: @convention(c) (Object) -> Void
    let controlContext: @convention(c) (Object, Int32, Int, UnsafeMutableRawPointer?) -> Int
    let setVerify: @convention(c) (Object, Int32, VerifyCallback?) -> Void
    let loadVerifyFile: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let useCertificateChainFile: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let usePrivateKeyFile: @convention(c) (Object, UnsafePointer<CChar>, Int32) -> Int32
    let checkPrivateKey: @convention(c) (Object) -> Int32
    let setPasswordCallback: @convention(c) (Object, PasswordCallback?) -> Void
    let setCiphersuites: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let setTicketCount: @convention(c) (Object, Int) -> Int32
    let certificateStore: @convention(c) (Object) -> Object
    let certificate: @convention(c) (Object) -> Object
    let setReadBufferLength: @convention(c) (Object, Int) -> Void
    let setFindSession: @convention(c) (Object, FindSessionCallback?) -> Void
    let setUseSession: @convention(c) (Object, UseSessionCallback?) -> Void
    let new: @convention(c) (Object) -> Object
    let free: @convention(c) (Object) -> Void
    let control: @convention(c) (Object, Int32, Int, UnsafeMutableRawPointer?) -> Int
    let setDescriptor: @convention(c) (Object, Int32) -> Int32
    let setAcceptState: @convention(c) (Object) -> Void
    let setConnectState: @convention(c) (Object) -> Void
    let setHost: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let setHostFlags: @convention(c) (Object, UInt32) -> Void
    let verifyParameters: @convention(c) (Object) -> Object
    let setData: @convention(c) (Object, Int32, UnsafeMutableRawPointer?) -> Int32
    let data: @convention(c) (Object, Int32) -> UnsafeMutableRawPointer?
    let verificationDataIndex: @convention(c) () -> Int32
    let doHandshake: @convention(c) (Object) -> Int32
    let read: @convention(c) (Object, UnsafeMutableRawPointer, Int32) -> Int32
    let pending: @convention(c) (Object) -> Int32
    let peek: @convention(c) (Object, UnsafeMutableRawPointer, Int32) -> Int32
    let write: @convention(c) (Object, UnsafeRawPointer, Int32) -> Int32
    let updateKey: @convention(c) (Object, Int32) -> Int32
    let shutdown: @convention(c) (Object) -> Int32
    let error: @convention(c) (Object, Int32) -> Int32
    let verifyResult: @convention(c) (Object) -> Int
    let sessionReused: @convention(c) (Object) -> Int32
    let currentCipher: @convention(c) (Object) -> Object
    let cipherName: @convention(c) (Object) -> UnsafePointer<CChar>?
    let findCipher: @convention(c) (Object, UnsafePointer<UInt8>) -> Object
    let newSession: @convention(c) () -> Object
    let setSessionKey: @convention(c) (Object, UnsafePointer<UInt8>, Int) -> Int32
    let setSessionCipher: @convention(c) (Object, Object) -> Int32
    let setSessionVersion: @convention(c) (Object, Int32) -> Int32

    init() throws(DynamicLibraryError) {
        let library = try DynamicLibrary(["libssl.so.3"], remedy: OpenSSL.remedy)
        unsafe clientMethod = try library.named("TLS_client_method")
        unsafe serverMethod = try library.named("TLS_server_method")
        unsafe newContext = try library.named("SSL_CTX_new")
        unsafe freeContext = try library.named("SSL_CTX_free")
        unsafe controlContext = try library.named("SSL_CTX_ctrl")
        unsafe setVerify = try library.named("SSL_CTX_set_verify")
        unsafe loadVerifyFile = try library.named("SSL_CTX_load_verify_file")
        unsafe useCertificateChainFile = try library.named("SSL_CTX_use_certificate_chain_file")
        unsafe usePrivateKeyFile = try library.named("SSL_CTX_use_PrivateKey_file")
        unsafe checkPrivateKey = try library.named("SSL_CTX_check_private_key")
        unsafe setPasswordCallback = try library.named("SSL_CTX_set_default_passwd_cb")
        unsafe setCiphersuites = try library.named("SSL_CTX_set_ciphersuites")
        unsafe setTicketCount = try library.named("SSL_CTX_set_num_tickets")
        unsafe certificateStore = try library.named("SSL_CTX_get_cert_store")
        unsafe certificate = try library.named("SSL_CTX_get0_certificate")
        unsafe setReadBufferLength = try library.named("SSL_CTX_set_default_read_buffer_len")
        unsafe setFindSession = try library.named("SSL_CTX_set_psk_find_session_callback")
        unsafe setUseSession = try library.named("SSL_CTX_set_psk_use_session_callback")
        unsafe new = try library.named("SSL_new")
        unsafe free = try library.named("SSL_free")
        unsafe control = try library.named("SSL_ctrl")
        unsafe setDescriptor = try library.named("SSL_set_fd")
        unsafe setAcceptState = try library.named("SSL_set_accept_state")
        unsafe setConnectState = try library.named("SSL_set_connect_state")
        unsafe setHost = try library.named("SSL_set1_host")
        unsafe setHostFlags = try library.named("SSL_set_hostflags")
        unsafe verifyParameters = try library.named("SSL_get0_param")
        unsafe setData = try library.named("SSL_set_ex_data")
        unsafe data = try library.named("SSL_get_ex_data")
        unsafe verificationDataIndex = try library.named("SSL_get_ex_data_X509_STORE_CTX_idx")
        unsafe doHandshake = try library.named("SSL_do_handshake")
        unsafe read = try library.named("SSL_read")
        unsafe pending = try library.named("SSL_pending")
        unsafe peek = try library.named("SSL_peek")
        unsafe write = try library.named("SSL_write")
        unsafe updateKey = try library.named("SSL_key_update")
        unsafe shutdown = try library.named("SSL_shutdown")
        unsafe error = try library.named("SSL_get_error")
        unsafe verifyResult = try library.named("SSL_get_verify_result")
        unsafe sessionReused = try library.named("SSL_session_reused")
        unsafe currentCipher = try library.named("SSL_get_current_cipher")
        unsafe cipherName = try library.named("SSL_CIPHER_get_name")
        unsafe findCipher = try library.named("SSL_CIPHER_find")
        unsafe newSession = try library.named("SSL_SESSION_new")
        unsafe setSessionKey = try library.named("SSL_SESSION_set1_master_key")
        unsafe setSessionCipher = try library.named("SSL_SESSION_set_cipher")
        unsafe setSessionVersion = try library.named("SSL_SESSION_set_protocol_version")
    }
}

/// The functions of libcrypto that are used.
@safe final class LibCrypto: @unchecked Sendable {
    typealias Object = OpaquePointer?

    // SAFETY: as in `LibSSL`.
    let nextError: @convention(c) () -> UInt
    let clearErrors: @convention(c) () -> Void
    let reasonText: @convention(c) (UInt) -> UnsafePointer<CChar>?
    let verificationText: @convention(c) (Int) -> UnsafePointer<CChar>?
    let setParameterIP: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let loadStoreFile: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let setStoreFlags: @convention(c) (Object, UInt) -> Int32
    let newVerification: @convention(c) () -> Object
    let freeVerification: @convention(c) (Object) -> Void
    let startVerification: @convention(c) (Object, Object, Object, Object) -> Int32
    let setVerificationPurpose: @convention(c) (Object, UnsafePointer<CChar>) -> Int32
    let verify: @convention(c) (Object) -> Int32
    let verificationError: @convention(c) (Object) -> Int32
    let setVerificationError: @convention(c) (Object, Int32) -> Void
    let verificationDepth: @convention(c) (Object) -> Int32
    let verifiedCertificate: @convention(c) (Object) -> Object
    let verificationData: @convention(c) (Object, Int32) -> UnsafeMutableRawPointer?
    let subject: @convention(c) (Object) -> Object
    let printName: @convention(c) (Object, Object, Int32, UInt) -> Int32
    let memoryBIO: @convention(c) () -> Object
    let newBIO: @convention(c) (Object) -> Object
    let freeBIO: @convention(c) (Object) -> Int32
    let readBIO: @convention(c) (Object, UnsafeMutableRawPointer, Int32) -> Int32

    init() throws(DynamicLibraryError) {
        let library = try DynamicLibrary(["libcrypto.so.3"], remedy: OpenSSL.remedy)
        unsafe nextError = try library.named("ERR_get_error")
        unsafe clearErrors = try library.named("ERR_clear_error")
        unsafe reasonText = try library.named("ERR_reason_error_string")
        unsafe verificationText = try library.named("X509_verify_cert_error_string")
        unsafe setParameterIP = try library.named("X509_VERIFY_PARAM_set1_ip_asc")
        unsafe loadStoreFile = try library.named("X509_STORE_load_file")
        unsafe setStoreFlags = try library.named("X509_STORE_set_flags")
        unsafe newVerification = try library.named("X509_STORE_CTX_new")
        unsafe freeVerification = try library.named("X509_STORE_CTX_free")
        unsafe startVerification = try library.named("X509_STORE_CTX_init")
        unsafe setVerificationPurpose = try library.named("X509_STORE_CTX_set_default")
        unsafe verify = try library.named("X509_verify_cert")
        unsafe verificationError = try library.named("X509_STORE_CTX_get_error")
        unsafe setVerificationError = try library.named("X509_STORE_CTX_set_error")
        unsafe verificationDepth = try library.named("X509_STORE_CTX_get_error_depth")
        unsafe verifiedCertificate = try library.named("X509_STORE_CTX_get_current_cert")
        unsafe verificationData = try library.named("X509_STORE_CTX_get_ex_data")
        unsafe subject = try library.named("X509_get_subject_name")
        unsafe printName = try library.named("X509_NAME_print_ex")
        unsafe memoryBIO = try library.named("BIO_s_mem")
        unsafe newBIO = try library.named("BIO_new")
        unsafe freeBIO = try library.named("BIO_free")
        unsafe readBIO = try library.named("BIO_read")
    }

    /// Empties the error queue of this thread.
    func clear() { clearErrors() }

    /// The reasons in this thread's error queue, oldest first, which leaves it empty.
    func takeErrors() -> [UInt] {
        var reasons: [UInt] = []
        while true {
            let code = nextError()
            guard code != 0, reasons.count < 32 else { return reasons }
            reasons.append(code)
        }
    }

    /// OpenSSL's words for an error code.
    func words(for code: UInt) -> String {
        unsafe reasonText(code).map { unsafe String(cString: $0) } ?? "error \(String(code, radix: 16))"
    }

    /// A certificate's subject (`CN=web,O=Example`), in the order of RFC 2253 and in the certificate's own.
    func subjects(of certificate: Object) -> [String] {
        guard let name = unsafe subject(certificate) else { return [] }
        let forward = OpenSSL.nameFlags & ~OpenSSL.nameReversed
        return [OpenSSL.nameFlags, forward].compactMap { flags in
            guard let text = unsafe newBIO(memoryBIO()) else { return nil }
            defer { _ = unsafe freeBIO(text) }
            guard unsafe printName(text, name, 0, flags) >= 0 else { return nil }
            var buffer = [UInt8](repeating: 0, count: 4096)
            // SAFETY: BIO_read fills at most as many bytes as it is told.
            let count = unsafe buffer.withUnsafeMutableBytes { unsafe readBIO(text, $0.baseAddress!, Int32($0.count)) }
            return String(decoding: buffer.prefix(max(0, Int(count))), as: UTF8.self)
        }
    }
}

extension DynamicLibrary {
    /// The function, as the type of what it is assigned to.
    @unsafe fileprivate func named<F>(_ name: String) throws(DynamicLibraryError) -> F {
        try unsafe function(name, as: F.self)
    }
}
